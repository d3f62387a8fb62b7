"""Weight adapters for changes that are not sums, computed as the tools that train them do.

ComfyUI's own (0.18 to 0.30, ``comfy/weight_adapter``) divides DoRA's rows by the norm of the weight before the change
where PEFT and LyCORIS divide by the norm after it, leaves out the rescale of an OFT, and multiplies an OFT's rotation
by its strength twice. Here, its adapters compute what is inside, at full strength; the rest follows PEFT
(peft/tuners/lora/dora.py) and LyCORIS (lycoris/functional/general.py, lycoris/modules/diag_oft.py). Any strength
between goes straight from the old weight to the new one.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def replacement(self, weight: Tensor, key: str) -> Tensor:
        """The new weight; same shape and dtype. ``weight`` must not be changed."""
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
        replaced = self.replacement(weight, key)
        weight += function((strength * (replaced - weight)).type(weight.dtype))
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

    def replacement(self, weight: Tensor, key: str) -> Tensor:
        inner, rescale = self.weights
        rotated = applied(inner, weight, key)
        return rotated if rescale is None else rotated * rescale.to(rotated)


class Replaced(Replacing):
    """A whole weight. ``weights``: the tensor."""

    name = "whole"

    def replacement(self, weight: Tensor, key: str) -> Tensor:
        whole: Tensor = self.weights[0]
        return whole.to(weight)


def applied(adapter: WeightAdapterBase, weight: Tensor, key: str) -> Tensor:
    """A weight with one of ComfyUI's adapters applied at full strength; the weight itself is not changed."""
    changed: Tensor = adapter.calculate_weight(
        weight.clone(), key, 1.0, 1.0, None, lambda change: change, torch.float32
    )
    return changed
