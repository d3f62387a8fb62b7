"""An SDXL MODEL's patches on a KOALA U-Net: what KOALA U-Net Swap puts in SDXL's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from uuid import uuid4

import comfy.utils

from ...koala.architecture.keys import parameters
from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage, is_teacher
from ..model import attached_facts, model_facts, unet_layout
from ..protocols import Model
from . import attention

COMPILED = "torch.compile"
"""Key of core's wrapper that runs a compiled U-Net: SDXL's, so it cannot stay."""

_UNET = "diffusion_model"


class Swapped(NamedTuple):
    """A KOALA MODEL with an SDXL MODEL's patches, and a text that says what was carried over and what was not."""

    model: Model
    report: str


def swap(sdxl: Model, koala: Model) -> Swapped:
    """A clone of ``koala`` with everything that was set on the MODEL ``sdxl``; neither of the two is changed.

    Carried over: weight patches of LoRAs (to the layers they belong to), model_sampling and other object patches, all
    of model_options (functions around cfg, attention and block patches by their blocks), wrappers, callbacks,
    additional models, attachments. Nothing in the result refers to SDXL's U-Net.

    Raises ValueError where ``sdxl`` is not SDXL or not as wide as ``koala``, or has patches by transformer blocks and
    nothing says which of those ``koala`` kept.
    """
    lineage = _lineage(sdxl, koala)
    own = name(lineage.student)
    lines = [
        f"{own} replaces SDXL: a U-Net of {parameters(lineage.student):,} parameters instead of "
        f"{parameters(lineage.teacher):,}"
    ]
    new = koala.clone()
    lines += _carry_weight_patches(sdxl, new, lineage)

    new.model_options = comfy.utils.deepcopy_list_dict(sdxl.model_options)
    remapping = attention.remap(new.model_options["transformer_options"], lineage)
    if remapping.remapped:
        lines.append(f"attention and block patches: {remapping.remapped} remapped to {own}'s blocks")
    if remapping.dropped:
        lines.append(f"dropped: attention patches on blocks that {own} lacks ({attention.places(remapping.dropped)})")

    new.object_patches |= {key: patch for key, patch in sdxl.object_patches.items() if not key.startswith(_UNET)}
    inside = [key for key in sdxl.object_patches if key.startswith(_UNET)]
    if inside:
        lines.append(f"dropped: patched modules of SDXL's U-Net, first: {inside[0]}")

    new.callbacks = _copied(sdxl.callbacks)
    new.wrappers = _copied(sdxl.wrappers)
    if any(by_key.pop(COMPILED, None) for by_key in new.wrappers.values()):
        new.model_options.pop("torch_compile_kwargs", None)
        lines.append("dropped: torch.compile, which ran SDXL's U-Net; put TorchCompileModel behind the swap")
    new.additional_models = {key: [model.clone() for model in models] for key, models in sdxl.additional_models.items()}
    new.attachments = {**sdxl.attachments, **koala.attachments}
    for kind, set_on in (("injections (motion modules, for example)", sdxl.injections), ("hooks", sdxl.forced_hooks)):
        if set_on:
            lines.append(f"dropped: {kind}, which change SDXL's own layers")
    return Swapped(new, "\n".join(lines))


def _lineage(sdxl: Model, koala: Model) -> Lineage:
    lineage = model_facts(koala).lineage
    layout = unet_layout(sdxl)
    if layout == lineage.teacher:
        return lineage
    raise ValueError(
        f"the MODEL is {_what(sdxl, layout)}; expected SDXL, with text of width {lineage.teacher.context} and "
        f"{lineage.teacher.channels[0]} channels, so that {name(lineage.student)} can take its place. "
        f"Connect the MODEL of an SDXL checkpoint."
    )


def _what(model: Model, layout: Layout | None) -> str:
    if layout is None:
        return f"not SDXL ({type(model.model).__name__})"
    if attached_facts(model) is not None:
        return f"already a KOALA model ({name(layout)})"
    if is_teacher(layout):
        return (
            f"an SDXL of other sizes (text width {layout.context}, {layout.channels[0]} channels, "
            f"{layout.in_channels} input channels)"
        )
    return name(layout)


def _carry_weight_patches(sdxl: Model, new: Model, lineage: Lineage) -> list[str]:
    """Give ``new`` the weight patches of ``sdxl``, under its own names; returns lines for the report."""
    patched = bool(sdxl.patches or sdxl.weight_wrapper_patches)
    names = lineage.names("comfy") if patched else {}  # a plain SDXL can be swapped without knowing what was kept
    names = {f"{_UNET}.{there}": f"{_UNET}.{here}" for there, here in names.items()}
    own = name(lineage.student)
    new.patches, counts = _weight_patches(sdxl.patches, names)
    new.patches_uuid = uuid4()
    new.weight_wrapper_patches = {
        names[key]: list(wrappers) for key, wrappers in sdxl.weight_wrapper_patches.items() if key in names
    }
    new.force_cast_weights = sdxl.force_cast_weights
    lines = []
    if counts.carried or counts.dropped:
        lines.append(f"weight patches: {counts.carried} carried over, {counts.dropped} are for layers that {own} lacks")
    if counts.merges:
        lines.append(f"dropped: {counts.merges} merged weights, which mix SDXL's own; merge KOALA models instead")
    return lines


class _Counts(NamedTuple):
    """Weight patches that were carried over, that have no layer, and that merge another model's weights."""

    carried: int
    dropped: int
    merges: int


def _weight_patches(patches: Mapping[str, list[Any]], names: Mapping[str, str]) -> tuple[dict[str, list[Any]], _Counts]:
    """The patches under KOALA's names, and what became of how many."""
    carried: dict[str, list[Any]] = {}
    dropped = merges = 0
    for key, listed in patches.items():
        changes = [patch for patch in listed if _is_change(patch)]
        merges += len(listed) - len(changes)
        if key not in names:
            dropped += len(changes)
        elif changes:
            carried[names[key]] = changes
    return carried, _Counts(sum(map(len, carried.values())), dropped, merges)


def _is_change(patch: tuple[Any, ...]) -> bool:
    """True for a patch that adds to a weight, as LoRAs do; False for one that mixes in or sets another model's."""
    _, value, strength_model, *_ = patch
    is_weight = isinstance(value, list) or (isinstance(value, tuple) and value[0] in ("set", "model_as_lora"))
    return strength_model == 1.0 and not is_weight


def _copied(functions: Mapping[str, Mapping[Any, Iterable[Any]]]) -> dict[str, dict[Any, list[Any]]]:
    return {kind: {key: list(listed) for key, listed in by_key.items()} for kind, by_key in functions.items()}
