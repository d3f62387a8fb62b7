"""Another model's weights on a KOALA: SDXL's LoRAs by stock nodes, and merges with models of other layouts.

ComfyUI matches weights by name, and a KOALA's block of the same name as SDXL's often is another one. What does the
wrong thing is known by its shapes: some of another model's weights never fit, and the rest of them came along.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import comfy.lora
from torch import Tensor

from ...koala.architecture.keys import Shape, shapes_of
from ...koala.architecture.layout import name
from ...koala.words import message
from ..model import is_koala, model_facts
from ..protocols import Model

MERGE_KOALAS = message(
    "merge KOALA models with each other. An SDXL fine-tune goes onto a KOALA as a LoRA: extract its difference to SDXL "
    "(ModelSubtract, then Extract and Save Lora) and load it with KOALA LoRA Loader"
)
_LAYER = re.compile(r"(?:input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)[._]")
_WHOLE = ("diff", "set", "model_as_lora")


@dataclass(frozen=True)
class Fit:
    """How much of another model's weights, or of a LoRA, there is a place for."""

    fitting: int
    misfits: tuple[str, ...]
    """Names of the weights that have another shape than what they are for."""
    absent: int = 0
    """How many are for layers that the model lacks."""

    @property
    def wrong(self) -> bool:
        """Whether it was made for another model, and changes some layers nevertheless."""
        return bool(self.misfits or (self.absent and self.fitting))


def merges(model: Model) -> Fit:
    """The weights of other models that are mixed into a MODEL's own."""
    return _fit(_patches(model, merged=True), _shapes(model))


def changes(model: Model) -> Fit:
    """The changes to a MODEL's weights: LoRAs, and differences as large as a weight."""
    return _fit(_patches(model, merged=False), _shapes(model))


def hooked(model: Model, hook: Any) -> Fit:
    """The changes that a hook (of a CONDITIONING) makes to a MODEL's weights."""
    weights: Mapping[str, Any] = getattr(hook, "weights", None) or {}
    shapes, unnamed = shapes_of(model.model.state_dict()), 0
    if getattr(hook, "need_weight_init", False):  # a LoRA's tensors, which ComfyUI will find places for by their names
        names = comfy.lora.model_lora_keys_unet(model.model, {})
        unnamed = sum(bool(_LAYER.search(key)) and not _known(key, names) for key in weights)
        weights = comfy.lora.load_lora(dict(weights), names, log_missing=False)
    found = _fit(((key, patch) for key, patch in weights.items() if key in shapes), shapes)
    return Fit(found.fitting, found.misfits, unnamed + len(weights.keys() - shapes.keys()))


def foreign_weights(model: Model) -> Iterator[str]:
    """What another model's weights are on a MODEL, in words, each with what to do."""
    koala = is_koala(model)
    own = name(model_facts(model).layout) if koala else message("this MODEL")
    if (found := merges(model)).wrong:
        total = found.fitting + len(found.misfits)
        yield message(
            "a merge with a model of another layout: {count} of its {total} weights have another shape than {model}'s "
            "(first: {first}), and the rest are of layers that have the same names and are not the same; {remedy}",
            count=len(found.misfits),
            total=total,
            model=own,
            first=found.misfits[0],
            remedy=MERGE_KOALAS,
        )
    if koala and (found := changes(model)).wrong:
        yield message(
            "a LoRA with {count} modules of another shape than {model}'s (first: {first}): an SDXL LoRA from the stock "
            "Load LoRA, which also changed wrong layers; load it with KOALA LoRA Loader",
            count=len(found.misfits),
            model=own,
            first=found.misfits[0],
        )


def require_own_weights(model: Model) -> None:
    """Check, before a MODEL is sampled or saved, that no other model's weights are in it where they do not belong.

    Raises ValueError for a merge with a model of another layout, and for a KOALA with a LoRA that was made for one.
    """
    for found in foreign_weights(model):
        raise ValueError(f"this MODEL has {found}.")


def require_own_hooks(model: Model, conds: Iterable[Mapping[str, Any]]) -> None:
    """The same for what hooks on the conditioning (its entries) do to a KOALA's weights.

    Raises ValueError for a LoRA, or weights, of another model.
    """
    own = name(model_facts(model).layout)
    groups = [cond["hooks"] for cond in conds if cond.get("hooks")]
    for hook in {id(hook.hook_ref): hook for group in groups for hook in group.hooks}.values():
        found = hooked(model, hook)
        if found.wrong:
            what = "a LoRA" if getattr(hook, "need_weight_init", False) else "weights"
            raise ValueError(
                f"the conditioning has a hook with {what} of another model than {own}: {len(found.misfits)} modules of "
                f"another shape, {found.absent} tensors for layers that it lacks, so that others change wrong layers. "
                f"Put KOALA Create Hook LoRA in place of Create Hook LoRA."
            )


def _shapes(model: Model) -> dict[str, Shape]:
    """Shapes of the weights that have patches; most MODELs that are sampled have none, and are not walked through."""
    if not model.patches:
        return {}
    return shapes_of({key: weight for key, weight in model.model.state_dict().items() if key in model.patches})


def _patches(model: Model, merged: bool) -> Iterator[tuple[str, Any]]:
    for key, listed in model.patches.items():
        for _, value, *_ in listed:
            if isinstance(value, list) == merged:
                yield key, value


def _fit(patches: Iterable[tuple[Any, Any]], shapes: Mapping[str, Shape]) -> Fit:
    fitting, misfits = 0, []
    for key, value in patches:
        size = _size(value)
        if size is None or size == prod(shapes[key]):
            fitting += 1
        else:
            misfits.append(key)
    return Fit(fitting, tuple(misfits))


def _known(key: str, names: Mapping[str, Any]) -> bool:
    """Whether a LoRA's tensor is of a module that ComfyUI has a name for."""
    parts = key.split(".")
    return any(".".join(parts[:end]) in names for end in range(1, len(parts)))


def _size(value: Any) -> int | None:
    """How many elements the weight has that a patch is for; None where the patch does not tell."""
    if isinstance(value, list):  # another model's weight, and what is patched into that
        return _numel(value[0][0])
    if isinstance(value, tuple):
        kind, held = value if len(value) == 2 else ("diff", value)
        padded = len(held) > 1  # the weight grows to the size of the difference
        return _numel(held[0]) if kind in _WHOLE and not padded else None
    made = _SIZES.get(getattr(value, "name", ""))
    return made(*value.weights) if made is not None else None


def _numel(held: Any) -> int | None:
    return held.numel() if isinstance(held, Tensor) else None


def _product(rows: Tensor, columns: Tensor) -> int:
    """Elements of a matrix (or kernel) from its two factors, [out, r] and [r, in, ...]."""
    return rows.shape[0] * prod(columns.shape[1:])


def _of_lora(up: Tensor, down: Tensor, alpha: Any, mid: Tensor | None, norms: Any, reshape: Any) -> int | None:
    if reshape is not None:
        return None
    return _product(up, down) * (prod(mid.shape[2:]) if mid is not None else 1)


def _of_loha(up: Tensor, down: Tensor, alpha: Any, _up: Tensor, _down: Tensor, mid: Tensor | None, *rest: Any) -> int:
    if mid is not None:  # Tucker: both factors have their rank first
        return up.shape[1] * down.shape[1] * prod(mid.shape[2:])
    return _product(up, down)


def _of_lokr(
    w1: Tensor | None,
    w2: Tensor | None,
    alpha: Any,
    w1_a: Tensor | None,
    w1_b: Tensor | None,
    w2_a: Tensor | None,
    w2_b: Tensor | None,
    mid: Tensor | None,
    *rest: Any,
) -> int | None:
    sizes = []
    for whole, rows, columns in ((w1, w1_a, w1_b), (w2, w2_a, w2_b)):
        if whole is not None:
            sizes.append(whole.numel())
        elif rows is None or columns is None or mid is not None:
            return None
        else:
            sizes.append(_product(rows, columns))
    return prod(sizes)


_SIZES: Mapping[str, Callable[..., int | None]] = {"lora": _of_lora, "loha": _of_loha, "lokr": _of_lokr}
"""Name of one of ComfyUI's adapters -> the number of elements, from its ``weights``."""
