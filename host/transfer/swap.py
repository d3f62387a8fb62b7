"""An SDXL MODEL's patches on a KOALA U-Net: what KOALA U-Net Swap puts in SDXL's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from uuid import uuid4

import comfy.utils

from ...koala.architecture.keys import parameters
from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage, is_teacher
from ..model import ATTACHMENT, model_facts, network_layout
from . import attention

COMPILED = "torch.compile"
"""Key of core's wrapper that runs a compiled U-Net: SDXL's, so it cannot stay."""

_NETWORK = "diffusion_model"


class Swapped(NamedTuple):
    """A KOALA MODEL that bears what an SDXL MODEL bore, and a text that says what was carried and what was not."""

    model: Any
    report: str


def swap(whole: Any, koala: Any) -> Swapped:
    """A clone of ``koala`` that bears what the SDXL MODEL ``whole`` bears; both stay as they are.

    Carried: weight patches of LoRAs (to the layers they belong to), model_sampling and other object patches, all of
    model_options (functions around cfg, attention and block patches by their blocks), wrappers, callbacks, additional
    models, attachments. Nothing in the result refers to SDXL's U-Net.

    Raises ValueError where ``whole`` is not SDXL, or not as wide as ``koala``.
    """
    line = _line(whole, koala)
    names = {f"{_NETWORK}.{there}": f"{_NETWORK}.{here}" for there, here in line.names("comfy").items()}
    lines = [
        f"{name(line.student)} in the place of SDXL: a U-Net of {parameters(line.student):,} parameters instead of "
        f"{parameters(line.teacher):,}"
    ]
    new = koala.clone()

    new.patches, carried, lost, merged = _weight_patches(whole.patches, names)
    new.patches_uuid = uuid4()
    if carried or lost:
        lines.append(f"weight patches: {carried} carried, {lost} belong to layers that {name(line.student)} lacks")
    if merged:
        lines.append(f"dropped: {merged} merged weights, which mix SDXL's own; merge KOALA models instead")

    new.model_options = comfy.utils.deepcopy_list_dict(whole.model_options)
    bound, dropped = attention.rebind(new.model_options["transformer_options"], line)
    if bound:
        lines.append(f"attention and block patches: {bound} bound to their blocks")
    if dropped:
        lines.append(f"dropped: attention patches on blocks that it lacks ({attention.places(dropped)})")

    new.object_patches |= {key: held for key, held in whole.object_patches.items() if not key.startswith(_NETWORK)}
    inside = [key for key in whole.object_patches if key.startswith(_NETWORK)]
    if inside:
        lines.append(f"dropped: patched modules of SDXL's U-Net, first: {inside[0]}")
    new.weight_wrapper_patches = {
        names[key]: list(held) for key, held in whole.weight_wrapper_patches.items() if key in names
    }
    new.force_cast_weights = whole.force_cast_weights

    new.callbacks = _copied(whole.callbacks)
    new.wrappers = _copied(whole.wrappers)
    if any(held.pop(COMPILED, None) for held in new.wrappers.values()):
        new.model_options.pop("torch_compile_kwargs", None)
        lines.append("dropped: torch.compile, which ran SDXL's U-Net; put TorchCompileModel behind the swap")
    new.additional_models = {key: [model.clone() for model in held] for key, held in whole.additional_models.items()}
    new.attachments = {**whole.attachments, **koala.attachments}
    for kind, held in (("injections (motion modules and the like)", whole.injections), ("hooks", whole.forced_hooks)):
        if held:
            lines.append(f"dropped: {kind}, which change SDXL's own layers")
    return Swapped(new, "\n".join(lines))


def _line(whole: Any, koala: Any) -> Lineage:
    line = model_facts(koala).lineage
    found = network_layout(getattr(whole.model, "diffusion_model", None))
    if found == line.teacher:
        return line
    raise ValueError(
        f"the MODEL is {_what(whole, found)}; expected SDXL, with text of width {line.teacher.context} and "
        f"{line.teacher.channels[0]} channels, so that {name(line.student)} can take its place. "
        f"Connect the MODEL of an SDXL checkpoint."
    )


def _what(whole: Any, found: Layout | None) -> str:
    if found is None:
        return f"no SDXL ({type(whole.model).__name__})"
    if whole.get_attachment(ATTACHMENT) is not None:
        return f"a KOALA already ({name(found)})"
    if is_teacher(found):
        return (
            f"an SDXL of other sizes (text width {found.context}, {found.channels[0]} channels, "
            f"{found.in_channels} input channels)"
        )
    return name(found)


def _weight_patches(
    patches: Mapping[str, list[Any]], names: Mapping[str, str]
) -> tuple[dict[str, list[Any]], int, int, int]:
    """The patches by KOALA's names; how many were carried, had no layer, and were merges of whole weights."""
    found: dict[str, list[Any]] = {}
    lost = merged = 0
    for key, listed in patches.items():
        changes = [patch for patch in listed if _is_change(patch)]
        merged += len(listed) - len(changes)
        if key not in names:
            lost += len(changes)
        elif changes:
            found[names[key]] = changes
    return found, sum(map(len, found.values())), lost, merged


def _is_change(patch: tuple[Any, ...]) -> bool:
    """True for a patch that adds to a weight, as LoRAs do; False for one that mixes in or sets another model's."""
    _, value, strength_model, *_ = patch
    whole_weights = isinstance(value, list) or (isinstance(value, tuple) and value[0] in ("set", "model_as_lora"))
    return strength_model == 1.0 and not whole_weights


def _copied(held: Mapping[str, Mapping[Any, Iterable[Any]]]) -> dict[str, dict[Any, list[Any]]]:
    return {kind: {key: list(functions) for key, functions in keyed.items()} for kind, keyed in held.items()}
