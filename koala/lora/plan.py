"""An SDXL LoRA's tensors -> the names of the KOALA layers that they belong to. Looks at names and shapes only.

Whatever the kind of adapter, a new module name carries it over.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..architecture import keys
from ..architecture.keys import Shape, tensors
from ..architecture.layout import Layout, name
from ..architecture.lineage import Kept, Lineage, lineage
from ..files.conventions import label
from ..files.header import CheckpointError, read_header
from ..files.other_models import describe
from .names import MAGNITUDE, TEXT, Groups, aliases, fits, split
from .origin import Origin, TrainedOn, origin_of

Outcome = Literal["applied", "removed", "folded", "mismatch", "unknown"]
"""``removed``: its layer is one that KOALA lacks. ``folded``: the same, and its change went to the layer's neighbour.
``mismatch``: the layer is there, in another shape."""


@dataclass(frozen=True)
class Module:
    """One module that a LoRA changes: its name in the file, the stage of the U-Net, and what became of it."""

    name: str
    stage: str
    outcome: Outcome


@dataclass(frozen=True)
class Plan:
    """How a LoRA goes onto one layout. ``names``: the file's tensor name -> ComfyUI's on that layout. ``folds``: the
    same for the changes of removed transformer blocks, each to be applied by itself on top. ``text``: tensor names of
    the text encoders' part, which is the same on SDXL and every KOALA."""

    file: str
    target: Layout
    origin: Origin | None
    names: Mapping[str, str] = field(repr=False)
    folds: tuple[Mapping[str, str], ...] = field(repr=False)
    text: tuple[str, ...] = field(repr=False)
    modules: tuple[Module, ...] = field(repr=False)

    def count(self, outcome: Outcome, stage: str | None = None) -> int:
        return sum(module.outcome == outcome and stage in (None, module.stage) for module in self.modules)

    @property
    def text_modules(self) -> int:
        return len({split(key)[0] for key in self.text})


def inspect_lora(
    path: Path, target: Layout, trained_on: TrainedOn = "auto", fold: bool = False, kept: Kept | None = None
) -> Plan:
    """Plan a LoRA file onto ``target``: a known KOALA's layout, at any width, or with ``kept`` any other.

    ``trained_on``: "auto" tells SDXL's from KOALA's own by the layers that the file names. ``fold``: give the changes
    of removed transformer blocks to the nearest block that was kept (an experiment) instead of leaving them out.
    ``kept``: what the model's file says it kept of SDXL's transformer blocks.

    Raises CheckpointError where the file is no LoRA, was made for another model, or has no layer in common with
    ``target``; ValueError where no lineage of ``target`` is known and one is needed.
    """
    header = read_header(path, "a LoRA")
    file = label(path)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for key in header.shapes:
        module, suffix = split(key)
        groups[module][suffix] = key
    if not any(suffix for parts in groups.values() for suffix in parts):
        raise CheckpointError(
            f"{file} is {describe(header.shapes)}; expected a LoRA with tensors such as "
            f"lora_unet_input_blocks_4_1_proj_in.lora_up.weight. Choose a LoRA that was made for SDXL or for KOALA."
        )
    text = {module: parts for module, parts in groups.items() if TEXT.match(module)}
    unet = {module: parts for module, parts in groups.items() if module not in text}
    origin = origin_of(file, unet, header.shapes, header.metadata, target, trained_on) if unet else None
    names, folds, modules = _carry(unet, header.shapes, target, origin, fold, kept)
    made = Plan(
        file, target, origin, names, folds, tuple(key for parts in text.values() for key in parts.values()), modules
    )
    if unet and not (made.names or made.folds or made.text):
        raise CheckpointError(
            f"{file}: none of its {len(unet)} modules reaches a layer of {name(target)} "
            f"({made.count('removed')} belong to layers that it lacks, {made.count('mismatch')} have another shape, "
            f"{made.count('unknown')} are unknown, first: {next(iter(unet))}). Leave this LoRA out, or use it on SDXL."
        )
    return made


STAGES = ("ends", "down 1", "down 2", "down 3", "middle", "up 1", "up 2", "up 3", "unknown")
"""Stages of the U-Net in the order of a forward pass; "ends" are its first and last convolutions and embeddings."""


def stage(module: str) -> str:
    """The stage that a module (diffusers name) belongs to."""
    if found := re.match(r"(down|up)_blocks\.(\d)", module):
        return f"{found[1]} {int(found[2]) + 1}"
    return "middle" if module.startswith("mid_block") else "ends"


def _carry(
    groups: Groups,
    shapes: Mapping[str, Shape],
    target: Layout,
    origin: Origin | None,
    fold: bool,
    kept: Kept | None,
) -> tuple[dict[str, str], tuple[dict[str, str], ...], tuple[Module, ...]]:
    """Where each module goes: ``Plan``'s names, folds and modules."""
    known = aliases(origin.layout) if origin else {}
    own = {_module(tensor.diffusers): tensor for tensor in tensors(target) if tensor.diffusers.endswith(".weight")}
    line: Lineage | None = None
    place = own  # the module of ``target`` that each module of the LoRA's own model became
    if origin and origin.layout != target:
        line = lineage(target, kept)
        place = {_module(whole.diffusers): own[_module(part.diffusers)] for part, whole in line.tensors}
    names: dict[str, str] = {}
    folds: list[dict[str, str]] = []
    modules: list[Module] = []
    for module, parts in groups.items():
        weight = known.get(module)
        if weight is None:
            modules.append(Module(module, "unknown", "unknown"))
            continue
        source = _module(weight.diffusers)
        goal = place.get(source)
        outcome: Outcome = "removed"
        if not fits(parts, shapes, weight.shape):
            outcome = "mismatch"
        elif goal is not None:
            outcome = "applied"
            names |= _moved(parts, goal)
        elif fold and line and source in line.neighbours and _adds(parts):
            outcome = "folded"
            folds.append(_moved(parts, own[line.neighbours[source]]))
        modules.append(Module(module, stage(source), outcome))
    return names, tuple(_packed(folds)), tuple(modules)


def _packed(folds: list[dict[str, str]]) -> list[dict[str, str]]:
    """As few maps as can be, none of which has two tensors for one place."""
    packed: list[dict[str, str]] = []
    for moved in folds:
        room = next((held for held in packed if not set(moved.values()) & set(held.values())), None)
        if room is None:
            packed.append(dict(moved))
        else:
            room |= moved
    return packed


def _moved(parts: Mapping[str, str], goal: keys.Tensor) -> dict[str, str]:
    module = f"diffusion_model.{goal.comfy.removesuffix('.weight')}"
    return {key: module + (".dora_scale" if suffix.startswith(MAGNITUDE) else suffix) for suffix, key in parts.items()}


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _adds(parts: Mapping[str, str]) -> bool:
    """Whether a change is a sum, so that one made for another layer can be added."""
    return not any(suffix.startswith((".dora", MAGNITUDE, ".set", ".oft", ".rescale")) for suffix in parts)
