"""An SDXL LoRA's tensors -> the names of the KOALA layers that they belong to. Looks at names and shapes only.

"LoRA" stands for every kind of adapter file: LoRA and LoCon, LoHa, LoKr, GLoRA, OFT, DoRA, whole differences, norms and
biases. All of them are a module's name and a suffix, so that a new module name carries any of them over.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Literal

from torch import Tensor

from . import keys
from .checkpoint import CheckpointError, label, read_header
from .foreign import describe
from .keys import Shape, tensors
from .layout import SDXL, SSD_1B, VEGA, Layout, name
from .lineage import KEPT_TRANSFORMERS, Lineage, at_widths_of, lineage

Outcome = Literal["applied", "removed", "folded", "mismatch", "unknown"]
"""``removed``: its layer is one that KOALA lacks. ``folded``: the same, and its change went to the layer's neighbour.
``mismatch``: the layer is there, in another shape."""
TrainedOn = Literal["auto", "SDXL", "KOALA"]

TEXT_STAGE = "text encoders"

_SUFFIX = re.compile(
    r"(?:\.(?:alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight|rescale"
    r"|lora_(?:up|down|mid)\.weight|lora_[AB](?:\.default)?(?:\.weight)?|lora(?:_linear_layer)?\.(?:up|down)\.weight"
    r"|lora_magnitude_vector(?:\.default)?(?:\.weight)?"
    r"|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|[ab][12]\.weight|oft_(?:blocks|diag))"
    r"|_lora\.(?:up|down)\.weight)$"
)
_MAGNITUDE = ".lora_magnitude_vector"  # PEFT's name, and a flat shape, for what every other tool calls dora_scale
_TEXT = re.compile(r"^(?:lora_te\d?_|lora_prior_te_|text_encoders?(?:_\d)?\.|conditioner\.)")
_CONTEXT = re.compile(r"attn2[._](?:processor\.)?to_[kv]$")

# What the modules of other families are called, dots and underscores alike. Looked through from the top.
_FAMILIES: tuple[tuple[str, str], ...] = (
    ("Stable Diffusion 1.x or 2.x", r"(down_blocks_0_attentions|up_blocks_3_attentions|input_blocks_1_1_)"),
    ("HunyuanVideo", r"double_blocks_\d+_img_attn_qkv.*token_refiner|individual_token_refiner"),
    ("Flux", r"(double_blocks_\d+_(img|txt)|single_blocks_\d+_(linear|modulation)|single_transformer_blocks_)"),
    ("Stable Diffusion 3", r"(joint_blocks_\d+|transformer_blocks_\d+_(attn_add_[qkv]_proj|ff_context))"),
    ("Qwen-Image", r"transformer_blocks_\d+_(img|txt)_m(od|lp)"),
    ("Wan", r"blocks_\d+_(cross_attn|self_attn|ffn)"),
    ("PixArt", r"(adaln_single|caption_projection)"),
    ("Stable Cascade", r"(lora_prior_unet|clip_txt_mapper)"),
)


@dataclass(frozen=True)
class Origin:
    """The model that a LoRA was trained on, its name, and the evidence."""

    layout: Layout
    model: str
    evidence: str


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
        return len({_split(key)[0] for key in self.text})


Groups = Mapping[str, Mapping[str, str]]
"""Module's name in the file -> suffix -> the tensor's whole name."""


def inspect_lora(path: Path, target: Layout, trained_on: TrainedOn = "auto", fold: bool = False) -> Plan:
    """Plan a LoRA file onto ``target``: a known KOALA's layout, at any width.

    ``trained_on``: "auto" tells SDXL's from KOALA's own by the layers that the file names. ``fold``: give the changes
    of removed transformer blocks to the nearest block that was kept (an experiment) instead of leaving them out.

    Raises CheckpointError where the file is no LoRA, was made for another model, or has no layer in common with
    ``target``; ValueError where no lineage of ``target`` is known and one is needed.
    """
    header = read_header(path, "a LoRA")
    file = label(path)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for key in header.shapes:
        module, suffix = _split(key)
        groups[module][suffix] = key
    if not any(suffix for parts in groups.values() for suffix in parts):
        raise CheckpointError(
            f"{file} is {describe(header.shapes)}; expected a LoRA with tensors such as "
            f"lora_unet_input_blocks_4_1_proj_in.lora_up.weight. Choose a LoRA that was made for SDXL or for KOALA."
        )
    text = {module: parts for module, parts in groups.items() if _TEXT.match(module)}
    unet = {module: parts for module, parts in groups.items() if module not in text}
    origin = _origin(file, unet, header.shapes, header.metadata, target, trained_on) if unet else None
    names, folds, modules = _carry(unet, header.shapes, target, origin, fold)
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


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that ``names`` lists, by their new names; PEFT's flat DoRA magnitudes get the dimensions of the
    weight that they scale, as other tools write them."""
    return {new: _upright(weights, old) if _MAGNITUDE in old else weights[old] for old, new in names.items()}


def _upright(weights: Mapping[str, Tensor], magnitude: str) -> Tensor:
    module, _, end = magnitude.partition(_MAGNITUDE)
    down = weights.get(f"{module}.lora_A{end or '.weight'}")
    return weights[magnitude].reshape(-1, *[1] * ((2 if down is None else down.ndim) - 1))


def summary(plan: Plan, text: str) -> str:
    """What became of a LoRA, for a person, in a few lines. ``text`` tells of its text part."""
    lines = [plan.file]
    if plan.origin:
        lines.append(f"trained on {plan.origin.model}: {plan.origin.evidence}")
        lines.append(f"U-Net on {name(plan.target)}: {_counts(Counter(module.outcome for module in plan.modules))}")
    unknown = [module.name for module in plan.modules if module.outcome == "unknown"]
    if unknown:
        lines.append(f"unknown modules: {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}")
    return "\n".join((*lines, f"{TEXT_STAGE}: {text}"))


def report(plan: Plan, text: str) -> str:
    """The summary, and a line for each stage."""
    stages = (f"  {stage}: {_counts(found)}" for stage, found in coverage(plan).items())
    return "\n".join((summary(plan, text), *stages))


def coverage(plan: Plan) -> dict[str, dict[Outcome, int]]:
    """How many modules of each stage had which outcome, in the order of a forward pass."""
    stages = sorted({module.stage for module in plan.modules}, key=STAGES.index)
    return {stage: {outcome: count for outcome in _WORDS if (count := plan.count(outcome, stage))} for stage in stages}


_WORDS: dict[Outcome, str] = {
    "applied": "applied",
    "folded": "folded into a neighbour",
    "removed": "removed with KOALA's missing layers",
    "mismatch": "of another shape",
    "unknown": "unknown",
}


def _counts(found: Mapping[Outcome, int]) -> str:
    return ", ".join(f"{found[outcome]} {words}" for outcome, words in _WORDS.items() if found.get(outcome))


STAGES = ("ends", "down 1", "down 2", "down 3", "middle", "up 1", "up 2", "up 3", "unknown")
"""Stages of the U-Net in the order of a forward pass; "ends" are its first and last convolutions and embeddings."""


def stage(module: str) -> str:
    """The stage that a module (diffusers name) belongs to."""
    if found := re.match(r"(down|up)_blocks\.(\d)", module):
        return f"{found[1]} {int(found[2]) + 1}"
    return "middle" if module.startswith("mid_block") else "ends"


def _split(key: str) -> tuple[str, str]:
    """Module and suffix of a LoRA's tensor; the suffix is empty where it is none of a LoRA's."""
    found = _SUFFIX.search(key)
    return (key[: found.start()], found[0]) if found else (key, "")


@cache
def aliases(layout: Layout) -> dict[str, keys.Tensor]:
    """What LoRA files call each of a layout's modules -> the module's weight.

    kohya (both numberings), LyCORIS as SimpleTuner writes it, SGM and ComfyUI, diffusers (attention processors and
    PEFT, with PEFT's own prefixes), OneTrainer (as kohya's).
    """
    found: dict[str, keys.Tensor] = {}
    for tensor in tensors(layout):
        if not tensor.diffusers.endswith(".weight"):
            continue
        diffusers, comfy = (known.removesuffix(".weight") for known in (tensor.diffusers, tensor.comfy))
        processor = diffusers.replace(".to_", ".processor.to_").removesuffix(".0" if "to_out" in diffusers else "")
        for form in {diffusers, processor}:
            for prefix in ("", "unet.", "base_model.model.", "unet.base_model.model.", "base_model.model.unet."):
                found[prefix + form] = tensor
        for prefix in ("diffusion_model.", "model.diffusion_model."):
            found[prefix + comfy] = tensor
        for form in (comfy, diffusers):
            found[f"lora_unet_{form.replace('.', '_')}"] = tensor
        found[f"lycoris_{diffusers.replace('.', '_')}"] = tensor
    return found


def _carry(
    groups: Groups, shapes: Mapping[str, Shape], target: Layout, origin: Origin | None, fold: bool
) -> tuple[dict[str, str], tuple[dict[str, str], ...], tuple[Module, ...]]:
    """Where each module goes: ``Plan``'s names, folds and modules."""
    known = aliases(origin.layout) if origin else {}
    own = {_module(tensor.diffusers): tensor for tensor in tensors(target) if tensor.diffusers.endswith(".weight")}
    line: Lineage | None = None
    place = own  # the module of ``target`` that each module of the LoRA's own model became
    if origin and origin.layout != target:
        line = lineage(target)
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
        if not _fits(parts, shapes, weight.shape):
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
    return {key: module + (".dora_scale" if suffix.startswith(_MAGNITUDE) else suffix) for suffix, key in parts.items()}


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _adds(parts: Mapping[str, str]) -> bool:
    """Whether a change is a sum, so that one made for another layer can be added."""
    return not any(suffix.startswith((".dora", _MAGNITUDE, ".set", ".oft", ".rescale")) for suffix in parts)


def _fits(parts: Mapping[str, str], shapes: Mapping[str, Shape], wanted: Shape) -> bool:
    size = _size({suffix: shapes[key] for suffix, key in parts.items()})
    return size is None or size == (wanted[0], prod(wanted[1:]))


def _size(parts: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns of the weight that an adapter is for, None for kinds that do not tell.

    Mirrors how ComfyUI's weight adapters put the matrices of each kind together.
    """
    try:
        return _size_of(parts)
    except IndexError:  # a scalar or vector where a matrix is due: fits nowhere
        return 0, 0


def _size_of(parts: Mapping[str, Shape]) -> tuple[int, int] | None:
    if diff := parts.get(".diff") or parts.get(".w_norm") or parts.get(".set_weight"):
        return diff[0], prod(diff[1:])
    if ".hada_w1_a" in parts:
        return _product(parts, ".hada_w1_a", ".hada_w1_b", ".hada_t1")
    if any(suffix.startswith(".lokr_") for suffix in parts):
        first, second = (
            _whole(parts[f".lokr_w{n}"])
            if f".lokr_w{n}" in parts
            else _product(parts, f".lokr_w{n}_a", f".lokr_w{n}_b", f".lokr_t{n}")
            for n in (1, 2)
        )
        return first[0] * second[0], first[1] * second[1]
    up = _one(parts, r"lora_up|lora_B|lora\.up|linear_layer\.up")
    down = _one(parts, r"lora_down|lora_A|lora\.down|linear_layer\.down")
    if up and down:
        return up[0], prod(down[1:]) * prod(parts.get(".lora_mid.weight", ())[2:])
    return None


def _one(parts: Mapping[str, Shape], pattern: str) -> Shape | None:
    return next((shape for suffix, shape in parts.items() if re.search(pattern, suffix)), None)


def _whole(shape: Shape) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _product(parts: Mapping[str, Shape], first: str, second: str, core: str) -> tuple[int, int]:
    """Rows and columns of a product of two matrices, or of a Tucker core with both."""
    a, b = parts.get(first, ()), parts.get(second, ())
    if core in parts:
        return a[1], b[1] * prod(parts[core][2:])
    return a[0], prod(b[1:])


# --- which model a LoRA was trained on ----------------------------------------------------------------------------

_RELATIVES: dict[Layout, str] = {
    SSD_1B: "SSD-1B",
    VEGA: "Segmind Vega",
    **{layout: name(layout) for layout in KEPT_TRANSFORMERS},
}


def _origin(
    file: str,
    groups: Groups,
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    target: Layout,
    trained_on: TrainedOn,
) -> Origin:
    """Tell SDXL's LoRAs from KOALA's own by the transformer blocks that they name.

    Raises CheckpointError for a LoRA of another model, saying which.
    """
    _refuse_other_family(file, groups, shapes, target)
    whole, own = at_widths_of(target, SDXL), name(target)
    if trained_on != "auto":
        return Origin(whole, "SDXL", "as chosen") if trained_on == "SDXL" else Origin(target, own, "as chosen")
    for layout, relative in _RELATIVES.items():
        if not _is_for(groups, at_widths_of(target, layout)):
            continue
        if at_widths_of(target, layout) == target:
            return Origin(target, own, f"it has exactly {own}'s transformer blocks")
        raise CheckpointError(
            f"{file} is a LoRA for {relative} (it has exactly its transformer blocks); expected one for SDXL or "
            f"for {own}. Use it with that model."
        )
    only_own = next((module for module in groups if module in aliases(target) and module not in aliases(whole)), None)
    if only_own:
        return Origin(target, own, f"it has layers by {own}'s own numbers, such as {only_own}")
    return Origin(whole, "SDXL", _evidence_of_sdxl(groups, shapes, metadata, target))


def _evidence_of_sdxl(groups: Groups, shapes: Mapping[str, Shape], metadata: Mapping[str, str], target: Layout) -> str:
    known, own = aliases(target), name(target)
    absent = next(
        (module for module in groups if module in aliases(at_widths_of(target, SDXL)) and module not in known), None
    )
    if absent:
        return f"it has layers that {own} lacks, such as {absent}"
    odd = [
        module for module, parts in groups.items() if module in known and not _fits(parts, shapes, known[module].shape)
    ]
    if odd:
        return f"its {odd[0]} has the shape of SDXL's"
    base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    said = f' (its metadata says "{base}")' if base else ""
    return f"assumed{said}, as {own} has all of its layers, too; choose KOALA if that is wrong"


def _is_for(groups: Groups, layout: Layout) -> bool:
    """True for a LoRA with exactly the transformer blocks of ``layout`` and no module that it lacks."""
    return _reached(groups, layout) == _transformers(layout) and all(module in aliases(layout) for module in groups)


def _reached(groups: Groups, layout: Layout) -> set[str]:
    """The transformer blocks that a LoRA's modules lie in, by their names in ``layout``."""
    known = aliases(layout)
    return _blocks_of(known[module].diffusers for module in groups if module in known)


@cache
def _transformers(layout: Layout) -> set[str]:
    return _blocks_of(tensor.diffusers for tensor in tensors(layout))


def _blocks_of(names: Iterable[str]) -> set[str]:
    return {found[0] for known in names if (found := re.match(r".+transformer_blocks\.\d+", known))}


def _refuse_other_family(file: str, groups: Groups, shapes: Mapping[str, Shape], target: Layout) -> None:
    """Raise CheckpointError for a LoRA that was made for another family of models than SDXL's."""
    expected = f"expected a LoRA for SDXL or for {name(target)}. Use it with a model of its own kind."
    widths = Counter(
        size[1]
        for module, parts in groups.items()
        if _CONTEXT.search(module) and (size := _size({suffix: shapes[key] for suffix, key in parts.items()}))
    )
    if widths and target.context not in widths:
        width = widths.most_common(1)[0][0]
        family = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
        kind = family.get(width, "another model")
        raise CheckpointError(f"{file} is a LoRA for {kind} (text width {width}, not {target.context}); {expected}")
    flat = [module.replace(".", "_") for module in groups]
    for family_name, pattern in _FAMILIES:
        if any(re.search(pattern, module) for module in flat):
            raise CheckpointError(f"{file} is a LoRA for {family_name}; {expected}")
    sdxl = at_widths_of(target, SDXL)
    if not any(module in aliases(sdxl) or module in aliases(target) for module in groups):
        first = ", ".join(sorted(groups)[:3])
        raise CheckpointError(
            f"{file} is a LoRA for an unknown model (none of its {len(groups)} modules is SDXL's; first: {first}); "
            f"{expected}"
        )
