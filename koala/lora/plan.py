"""An SDXL LoRA's tensors -> the names of the KOALA layers that they belong to. Looks at names and shapes only.

Whatever the kind of adapter, renaming its modules is all that is needed.
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
from ..architecture.lineage import KeptTransformers, lineage
from ..files.conventions import label
from ..files.header import CheckpointError, read_header
from ..files.other_models import describe
from .names import MAGNITUDE, TEXT, Groups, aliases, fits, split
from .origin import Origin, TrainedOn, origin_of

Outcome = Literal["applied", "removed", "folded", "mismatch", "unknown"]
"""``removed``: its layer is one that KOALA lacks. ``folded``: the same, and its change is added to the nearest kept
transformer block. ``mismatch``: the layer is there, in another shape."""


@dataclass(frozen=True)
class Module:
    """One module that a LoRA changes, and what became of it."""

    name: str
    """As in the file."""
    stage: str
    """One of ``STAGES``."""
    outcome: Outcome


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a LoRA file go on one layout."""

    file: str
    target: Layout
    origin: Origin | None
    """The model that it was trained on; None for a LoRA of text encoders alone."""
    names: Mapping[str, str] = field(repr=False)
    """Tensor name in the file -> ComfyUI's name on the target."""
    folds: tuple[Mapping[str, str], ...] = field(repr=False)
    """The same for the changes of removed transformer blocks, each to be applied by itself on top."""
    text: tuple[str, ...] = field(repr=False)
    """Tensor names for the text encoders, which are the same on SDXL and every KOALA."""
    modules: tuple[Module, ...] = field(repr=False)

    def count(self, outcome: Outcome, stage: str | None = None) -> int:
        """How many modules of a stage, or of all stages, had this outcome."""
        return sum(module.outcome == outcome and stage in (None, module.stage) for module in self.modules)

    @property
    def text_modules(self) -> int:
        """How many modules of the text encoders it changes."""
        return len({split(key)[0] for key in self.text})


def inspect_lora(
    path: Path,
    target: Layout,
    trained_on: TrainedOn = "auto",
    fold: bool = False,
    kept_transformers: KeptTransformers | None = None,
) -> Plan:
    """Plan how a LoRA file is applied to a KOALA.

    Args:
        path: the LoRA.
        target: a known KOALA's layout, at any width, or any other with ``kept_transformers``.
        trained_on: "auto" tells SDXL's LoRAs from KOALA's own by the layers that the file names.
        fold: whether the changes of removed transformer blocks are added to the nearest block that was kept (an
            experiment) instead of left out.
        kept_transformers: which of SDXL's transformer blocks the model's file says that it kept.

    Raises:
        CheckpointError: the file is not a LoRA, was made for another model, or has no layer in common with ``target``.
        ValueError: no lineage of ``target`` is known and one is needed.
    """
    header = read_header(path, "a LoRA")
    file = label(path)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for key in header.shapes:
        module, suffix = split(key)
        groups[module][suffix] = key
    if not any(suffix for suffixes in groups.values() for suffix in suffixes):
        raise CheckpointError(
            f"{file} is {describe(header.shapes)}; expected a LoRA with tensors such as "
            f"lora_unet_input_blocks_4_1_proj_in.lora_up.weight. Choose a LoRA that was made for SDXL or for KOALA."
        )
    text = tuple(key for module, suffixes in groups.items() if TEXT.match(module) for key in suffixes.values())
    unet = {module: suffixes for module, suffixes in groups.items() if not TEXT.match(module)}
    origin = origin_of(file, unet, header.shapes, header.metadata, target, trained_on) if unet else None
    names, folds, modules = _assign(unet, header.shapes, target, origin, fold, kept_transformers)
    plan = Plan(file, target, origin, names, folds, text, modules)
    if unet and not (plan.names or plan.folds or plan.text):
        raise CheckpointError(
            f"{file}: none of its {len(unet)} modules matches a layer of {name(target)} "
            f"({plan.count('removed')} belong to layers that it lacks, {plan.count('mismatch')} have another shape, "
            f"{plan.count('unknown')} are unknown, first: {next(iter(unet))}). Leave this LoRA out, or use it on SDXL."
        )
    return plan


STAGES = ("ends", "down 1", "down 2", "down 3", "middle", "up 1", "up 2", "up 3", "unknown")
"""Stages of the U-Net in the order of a forward pass; "ends" are its first and last convolutions and embeddings."""


def stage(module: str) -> str:
    """The stage that a module (diffusers name) belongs to."""
    if found := re.match(r"(down|up)_blocks\.(\d)", module):
        return f"{found[1]} {int(found[2]) + 1}"
    return "middle" if module.startswith("mid_block") else "ends"


def _assign(
    groups: Groups,
    shapes: Mapping[str, Shape],
    target: Layout,
    origin: Origin | None,
    fold: bool,
    kept_transformers: KeptTransformers | None,
) -> tuple[dict[str, str], tuple[dict[str, str], ...], tuple[Module, ...]]:
    """Where each module goes: ``Plan``'s names, folds and modules."""
    known = aliases(origin.layout) if origin else {}
    own = {_module(tensor.diffusers): tensor for tensor in tensors(target) if tensor.diffusers.endswith(".weight")}
    descendants = own  # module of the model that the LoRA was trained on -> the target's weight that came from it
    neighbours: Mapping[str, str] = {}
    if origin and origin.layout != target:
        ancestry = lineage(target, kept_transformers)
        descendants = {
            _module(teacher.diffusers): own[_module(student.diffusers)] for student, teacher in ancestry.tensors
        }
        neighbours = ancestry.neighbours if fold else {}
    names: dict[str, str] = {}
    folds: list[dict[str, str]] = []
    modules: list[Module] = []
    for module, suffixes in groups.items():
        weight = known.get(module)
        if weight is None:
            modules.append(Module(module, "unknown", "unknown"))
            continue
        source = _module(weight.diffusers)
        outcome: Outcome = "removed"
        if not fits(suffixes, shapes, weight.shape):
            outcome = "mismatch"
        elif source in descendants:
            outcome = "applied"
            names |= _renamed(suffixes, descendants[source])
        elif source in neighbours and _is_sum(suffixes):
            outcome = "folded"
            folds.append(_renamed(suffixes, own[neighbours[source]]))
        modules.append(Module(module, stage(source), outcome))
    return names, tuple(_packed(folds)), tuple(modules)


def _packed(folds: list[dict[str, str]]) -> list[dict[str, str]]:
    """As few maps as possible, none of which has two tensors for one name."""
    packed: list[dict[str, str]] = []
    for names in folds:
        free = next((other for other in packed if not set(names.values()) & set(other.values())), None)
        if free is None:
            packed.append(dict(names))
        else:
            free |= names
    return packed


def _renamed(suffixes: Mapping[str, str], weight: keys.Tensor) -> dict[str, str]:
    """Names of a module's tensors in the file -> ComfyUI's names on a weight of the target."""
    module = f"diffusion_model.{weight.comfy.removesuffix('.weight')}"
    return {
        key: module + (".dora_scale" if suffix.startswith(MAGNITUDE) else suffix) for suffix, key in suffixes.items()
    }


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _is_sum(suffixes: Mapping[str, str]) -> bool:
    """Whether a change is added to the weight, so that one made for another layer can be added, too."""
    return not any(suffix.startswith((".dora", MAGNITUDE, ".set", ".oft", ".rescale")) for suffix in suffixes)
