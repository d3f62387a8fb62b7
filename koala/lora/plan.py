"""An SDXL LoRA's tensors -> the names of the KOALA layers that they belong to, and what becomes of each module.

Looks at names, shapes, types and a few single numbers; the weights themselves are read by ``weights.py``. Whatever the
kind of adapter, renaming its modules is all that is needed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..architecture.keys import Shape, tensors
from ..architecture.layout import SDXL, Layout, name
from ..architecture.lineage import KeptTransformers, at_widths_of, lineage
from ..files.conventions import CARRY_KEY, label
from ..files.header import CheckpointError, Header, read_header
from ..files.other_models import describe
from ..words import message
from .kinds import DORA_SCALE, MalformedError, other_kind, split
from .modules import WORDS, Contents, Layer, Module, Outcome, Tables, judge, placed, tables
from .names import TEXT, find, group, text_aliases, text_shapes
from .origin import Origin, TrainedOn, origin_of
from .scale import Config, configs


@dataclass(frozen=True)
class Learned:
    """What ``dev.py carry`` made a LoRA of."""

    name: str
    """The file's."""
    share: float
    """How much of that file's change of SDXL's output it reached on samples that it was not learned from."""


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a LoRA file go on one layout."""

    path: Path
    target: Layout
    origin: Origin | None
    """The model that it was trained on; None for a LoRA of text encoders alone."""
    modules: tuple[Module, ...] = field(repr=False)
    """Those of the U-Net."""
    text: tuple[Module, ...] = field(repr=False)
    """Those of the text encoders, which are the same on SDXL and every KOALA."""
    configured: str = ""
    """Where its strength stands, if not in alphas of its own."""
    learned: Learned | None = None
    """What it was learned from, if it was, for a KOALA, from what another LoRA does on SDXL."""

    @property
    def file(self) -> str:
        """Its name for messages."""
        return label(self.path)

    @property
    def names(self) -> dict[str, str]:
        """Tensor name in the file -> ComfyUI's name, for the U-Net's modules that are applied."""
        return _names(module for module in self.modules if module.outcome == "applied")

    @property
    def folds(self) -> tuple[tuple[Module, ...], ...]:
        """The changes of removed transformer blocks, to be applied on top, in groups that name no layer twice."""
        packed: list[dict[str, Module]] = []
        for module in self.modules:
            if module.outcome == "folded":
                free = next((one for one in packed if module.target not in one), None)
                if free is None:
                    packed.append(free := {})
                free[module.target] = module
        return tuple(tuple(one.values()) for one in packed)

    @property
    def applied(self) -> tuple[Module, ...]:
        """All modules whose tensors are used, of U-Net and text encoders."""
        return tuple(module for module in (*self.modules, *self.text) if module.outcome in ("applied", "folded"))

    def count(self, outcome: Outcome, stage: str | None = None) -> int:
        """How many of the U-Net's modules, in a stage or in all, had this outcome."""
        return sum(module.outcome == outcome and stage in (None, module.stage) for module in self.modules)

    def with_findings(self, findings: Mapping[str, tuple[Outcome, str]]) -> Plan:
        """The plan with what turned out about some modules since: name -> outcome and reason."""

        def judged(modules: Iterable[Module]) -> tuple[Module, ...]:
            return tuple(
                replace(module, outcome=findings[module.name][0], reason=findings[module.name][1])
                if module.name in findings
                else module
                for module in modules
            )

        return replace(self, modules=judged(self.modules), text=judged(self.text)) if findings else self

    def require_any(self) -> None:
        """Raise CheckpointError where not one module is applied."""
        if self.applied:
            return
        everything = (*self.modules, *self.text)
        first = next((module for module in everything if module.reason), everything[0])
        found = Counter(module.outcome for module in everything)
        counts = ", ".join(f"{count} {WORDS[outcome]}" for outcome, count in found.items())
        trained = f"; trained on {self.origin.model}: {self.origin.evidence}" if self.origin else ""
        damaged = found.keys() - {"removed"} and found.keys() <= {"incomplete", "malformed", "removed"}
        remedy = (
            "Fetch the file again, or leave this LoRA out."
            if damaged
            else "Leave this LoRA out, or use it on the model that it was made for."
        )
        raise CheckpointError(
            f"{self.file}: none of its {len(everything)} modules can be applied to {name(self.target)}"
            f"{' or these text encoders' if self.text else ''} ({counts}; first: {first.name}"
            f"{', ' + first.reason if first.reason else ''}{trained}). {remedy}"
        )


def _names(modules: Iterable[Module]) -> dict[str, str]:
    return {old: new for module in modules for old, new in module.names.items()}


def inspect_lora(
    path: Path,
    target: Layout,
    trained_on: TrainedOn = "auto",
    fold: bool = False,
    kept_transformers: KeptTransformers | None = None,
    text: Mapping[str, Shape] | None = None,
) -> Plan:
    """Plan how a LoRA file is applied to a KOALA.

    Args:
        path: the LoRA.
        target: a known KOALA's layout, at any width, or any other with ``kept_transformers``.
        trained_on: "auto" tells SDXL's LoRAs from KOALA's own by the layers that the file names.
        fold: whether the changes of removed transformer blocks are added to the nearest block that was kept (an
            experiment) instead of left out.
        kept_transformers: which of SDXL's transformer blocks the model's file says that it kept.
        text: ComfyUI's names and the shapes of the text encoders' tensors; None where they are not at hand, and the
            names of SDXL's count.

    Raises:
        CheckpointError: the file is not a LoRA, was made for another model, or nothing of it can be applied.
        ValueError: no lineage of ``target`` is known and one is needed.
    """
    header = read_header(path, "a LoRA")
    file = label(path)
    weights = text_shapes() if text is None else dict(text)
    encoders = text_aliases(weights)
    sdxl = at_widths_of(target, SDXL)
    groups = group(
        header.shapes,
        lambda module: module in encoders or any(find(layout, module) is not None for layout in (sdxl, target)),
    )
    if not any(split(key)[1] for key in header.shapes):
        raise _not_a_lora(file, header)
    known = tables(header, groups)
    contents = {module: judge(suffixes, known) for module, suffixes in groups.items()}
    _refuse_other_kinds(file, groups, contents)
    settings = configs(header)
    unet = {module: found for module, found in contents.items() if not TEXT.match(module)}
    origin = None
    if unet:
        base = next((config.base for config in settings.values()), "")
        metadata = {"base_model_name_or_path": base, **header.metadata}
        origin = origin_of(file, {module: found.made for module, found in unet.items()}, metadata, target, trained_on)
    placing = _Placing(known)
    modules = _unet(placing, unet, target, origin, fold, kept_transformers, settings.get("unet"))
    texts = _text(placing, contents, encoders, weights, settings)
    without = any(
        found.made and found.made.kind.alpha == "scale" and found.alpha is None for found in contents.values()
    )
    source = next((config.source for config in settings.values() if without), "")
    plan = Plan(path, target, origin, modules, texts, source, _learned(header))
    plan.require_any()
    return plan


def _learned(header: Header) -> Learned | None:
    """What the metadata say of it; nothing where they cannot be read."""
    try:
        told = json.loads(header.metadata.get(CARRY_KEY, ""))
        return Learned(str(told["lora"]["name"]), float(told["shares"][told["way"]]))
    except (ValueError, KeyError, TypeError):
        return None


def _not_a_lora(file: str, header: Header) -> CheckpointError:
    kind = describe(header.shapes)
    first = ", ".join(sorted(header.shapes)[:3])
    found = (
        f"an adapter of an unknown kind ({len(header.shapes)} tensors, first: {first})" if kind == "a LoRA" else kind
    )
    return CheckpointError(
        f"{file} is {found}; expected a LoRA with tensors such as lora_unet_input_blocks_4_1_proj_in.lora_up.weight. "
        f"Choose a LoRA that was made for SDXL or for KOALA."
    )


def _refuse_other_kinds(file: str, groups: Mapping[str, Iterable[str]], contents: Mapping[str, Contents]) -> None:
    """Raise CheckpointError for a file whose modules are all of a kind that ComfyUI does not apply."""
    kinds = Counter(kind for suffixes in groups.values() for suffix in suffixes if (kind := other_kind(suffix)))
    judged = [found for found in contents.values() if "" not in found.tensors]
    if kinds and all(found.outcome in ("unsupported", "incomplete") for found in judged):
        raise CheckpointError(
            f"{file} holds {' and '.join(kinds)}, which ComfyUI cannot apply; expected a LoRA, LoCon, LoHa, "
            f"LoKr, GLoRA, OFT, DoRA or weight differences. Convert it to one of them, or leave it out."
        )


STAGES = ("ends", "down 1", "down 2", "down 3", "middle", "up 1", "up 2", "up 3", "unknown")
"""Stages of the U-Net in the order of a forward pass; "ends" are its first and last convolutions and embeddings."""


def stage(module: str) -> str:
    """The stage that a module (diffusers name) belongs to."""
    if found := re.match(r"(down|up)_blocks\.(\d)", module):
        return f"{found[1]} {int(found[2]) + 1}"
    return "middle" if module.startswith("mid_block") else "ends"


class _Placing:
    """Puts modules onto layers, and knows which layer has been taken already."""

    def __init__(self, file: Tables) -> None:
        self.file = file
        self.taken: dict[str, str] = {}

    def place(self, module: str, stage: str, contents: Contents, layer: Layer, config: Config | None) -> Module:
        """The module on a layer, or what is wrong with it there; see ``modules.placed``."""
        try:
            if other := self.taken.get(layer.name):
                raise MalformedError(message("it changes the same layer as {other}", other=other))
            found = placed(module, stage, contents, layer, self.file, config)
        except MalformedError as error:
            return Module(module, stage, "malformed", error.reason)
        self.taken[layer.name] = module
        return found

    def fold(self, module: str, stage: str, contents: Contents, layer: Layer, config: Config | None) -> Module:
        """The same for a change that is added to another layer than its own."""
        try:
            return replace(placed(module, stage, contents, layer, self.file, config), outcome="folded")
        except MalformedError as error:
            return Module(module, stage, "malformed", error.reason)


def _unet(
    placing: _Placing,
    contents: Mapping[str, Contents],
    target: Layout,
    origin: Origin | None,
    fold: bool,
    kept_transformers: KeptTransformers | None,
    config: Config | None,
) -> tuple[Module, ...]:
    """What becomes of each module of the U-Net."""
    if origin is None:
        return ()
    own = {_module(tensor.diffusers): tensor for tensor in tensors(target) if tensor.diffusers.endswith(".weight")}
    biases = {_module(tensor.diffusers) for tensor in tensors(target) if tensor.diffusers.endswith(".bias")}
    descendants = own  # module of the model that the LoRA was trained on -> the target's weight that came from it
    neighbours: Mapping[str, str] = {}
    if origin.layout != target:
        ancestry = lineage(target, kept_transformers)
        descendants = {
            _module(teacher.diffusers): own[_module(student.diffusers)] for student, teacher in ancestry.tensors
        }
        neighbours = ancestry.neighbours if fold else {}

    def become(module: str, found: Contents) -> Module:
        weight = find(origin.layout, module)
        source = _module(weight.diffusers) if weight else ""
        where = stage(source) if weight else "unknown"
        if found.outcome and (weight or _is_other_kind(found)):
            return Module(module, where, found.outcome, found.reason)
        if weight is None or found.made is None:
            return Module(module, where, "unknown")
        if not found.made.fits(weight.shape):
            return Module(module, where, "mismatch")
        folded = source not in descendants
        if folded and not (source in neighbours and found.made.kind.is_sum and DORA_SCALE not in found.tensors):
            return Module(module, where, "removed")
        layer = own[neighbours[source]] if folded else descendants[source]
        name = f"diffusion_model.{layer.comfy.removesuffix('.weight')}"
        put = placing.fold if folded else placing.place
        return put(module, where, found, Layer(name, layer.shape, _module(layer.diffusers) in biases), config)

    return tuple(become(module, found) for module, found in contents.items())


def _text(
    placing: _Placing,
    contents: Mapping[str, Contents],
    encoders: Mapping[str, str],
    weights: Mapping[str, Shape | None],
    settings: Mapping[str, Config],
) -> tuple[Module, ...]:
    """What becomes of each module of the text encoders."""

    def become(module: str, found: Contents) -> Module:
        known = encoders.get(module)
        if found.outcome and (known or _is_other_kind(found)):
            return Module(module, "text", found.outcome, found.reason)
        if known is None or found.made is None:
            return Module(module, "text", "unknown")
        shape = weights[f"{known}.weight"]
        if shape is not None and not found.made.fits(shape):
            return Module(module, "text", "mismatch")
        config = settings.get("text_encoder_2" if known.startswith("clip_g") else "text_encoder")
        layer = Layer(f"text_encoders.{known}", shape, f"{known}.bias" in weights)
        return placing.place(module, "text", found, layer, config)

    return tuple(become(module, found) for module, found in contents.items() if TEXT.match(module))


def _is_other_kind(found: Contents) -> bool:
    return any(map(other_kind, found.tensors))


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
