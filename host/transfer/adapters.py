"""Weight adapters for changes that are not sums, computed as the tools that train them do.

ComfyUI's own (0.18 to 0.30, ``comfy/weight_adapter``) divides DoRA's rows by the norm of the weight before the change
where PEFT and LyCORIS divide by the norm after it, leaves out the rescale of an OFT, and multiplies an OFT's rotation
by its strength twice. Here, its adapters compute what is inside, at full strength; the rest follows PEFT
(peft/tuners/lora/dora.py) and LyCORIS (lycoris/functional/general.py, lycoris/modules/diag_oft.py). Any strength
between goes straight from the old weight to the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor


class Replacing(WeightAdapterBase):  # type: ignore[misc]
    """A patch that says what a weight becomes, not what is added to it. ``weights``: tensors and adapters within, which
    ComfyUI moves between devices, and rebuilds the patch from."""

    name = "replacing"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def changed(self, weight: Tensor, key: str, strength: float) -> Tensor:
        """The new weight at a strength; same shape and dtype. ``weight`` must not be changed."""
        return weight + strength * (self.replacement(weight, key) - weight)

    def replacement(self, weight: Tensor, key: str) -> Tensor:
        """The new weight at full strength; the same."""
        raise NotImplementedError

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        *further: Any,
        **named: Any,
    ) -> Tensor:
        """ComfyUI's way to apply a patch: ``weight``, changed in place, at any strength."""
        weight += function((self.changed(weight, key, strength) - weight).type(weight.dtype))
        return weight


class Decomposed(Replacing):
    """DoRA: a change, and the norm that each row (or input channel) of the weight then has. ``weights``: the adapter of
    the change, norms [rows, 1, ...] or [1, columns, 1, ...]."""

    name = "dora"

    def replacement(self, weight: Tensor, key: str) -> Tensor:
        inner, norms = self.weights
        merged = applied(inner, weight, key).float()
        across = tuple(axis for axis in range(merged.ndim) if norms.shape[axis] == 1)
        found = torch.linalg.vector_norm(merged, dim=across, keepdim=True) + torch.finfo(merged.dtype).eps
        decomposed: Tensor = merged * (norms.to(merged) / found)
        return decomposed.type(weight.dtype)


class Rotated(Replacing):
    """OFT and BOFT: rows are rotated in blocks, and then rescaled. ``weights``: ComfyUI's adapter, and a factor
    [rows, 1, ...] or None."""

    name = "rotation"

    def changed(self, weight: Tensor, key: str, strength: float) -> Tensor:
        inner, rescale = self.weights
        if inner.name == "boft" and strength:  # as LyCORIS does: each factor at this strength, their product as it is
            rotated = weight + (applied(inner, weight, key, strength) - weight) / strength
        else:
            rotated = weight + strength * (applied(inner, weight, key) - weight)
        return rotated if rescale is None else rotated * (1 + strength * (rescale.to(rotated) - 1))


class Replaced(Replacing):
    """A whole weight. ``weights``: the tensor."""

    name = "whole"

    def replacement(self, weight: Tensor, key: str) -> Tensor:
        whole: Tensor = self.weights[0]
        return whole.to(weight)


def applied(adapter: WeightAdapterBase, weight: Tensor, key: str, strength: float = 1.0) -> Tensor:
    """A weight with one of ComfyUI's adapters applied; the weight itself is not changed."""
    changed: Tensor = adapter.calculate_weight(weight.clone(), key, strength, 1.0, None, _unchanged, torch.float32)
    return changed


def _unchanged(change: Tensor) -> Tensor:
    return change


def without_core(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """A module's tensors with the Tucker core of a LoKr multiplied out, which ComfyUI's adapter computes and then fails
    to use (``torch.kron`` of a transposed view); others as they are. Names begin with ``module``."""
    names = [f"{module}.lokr_{part}" for part in ("t2", "w2_a", "w2_b")]
    if names[0] not in tensors:
        return dict(tensors)
    core, first, second = (tensors[name].float() for name in names)
    factor = torch.einsum("ijkl,jr,ip->prkl", core, second, first)
    rest = {name: tensor for name, tensor in tensors.items() if name not in names}
    if f"{module}.lokr_w1" in rest and f"{module}.alpha" in rest:  # two whole factors: ComfyUI asks for no alpha
        factor = factor * (float(rest.pop(f"{module}.alpha")) / len(core))
    return rest | {f"{module}.lokr_w2": factor.contiguous()}
