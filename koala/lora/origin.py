"""Which model a LoRA was trained on: SDXL, a KOALA, a relative of theirs, or something else altogether."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ..architecture.keys import tensors
from ..architecture.layout import SDXL, SSD_1B, VEGA, Layout, name
from ..architecture.lineage import KEPT_TRANSFORMERS, at_widths_of
from ..files.header import CheckpointError
from ..files.other_models import FAMILIES_BY_TEXT_WIDTH
from ..words import message
from .kinds import Made
from .names import find

TrainedOn = Literal["auto", "SDXL", "KOALA"]
CHOSEN = message("as chosen")

_CONTEXT = re.compile(r"attn2[._](?:processor\.)?to_[kv]$")

_TEXT_ENCODER = re.compile(r"^(?:base_model\.model\.)?(?:text_model\.)?encoder\.layers\.\d+\.(?:self_attn|mlp)\.")

# What the modules of other families are called, with underscores for dots. Searched from the top.
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

_METADATA = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model_name_or_path")
"""Entries of a LoRA's metadata that may name the model that it was trained on: kohya's, the model spec's, PEFT's."""

_RELATIVES: dict[Layout, str] = {
    SSD_1B: "SSD-1B",
    VEGA: "Segmind Vega",
    **{layout: name(layout) for layout in KEPT_TRANSFORMERS},
}
_ABSENT = "absent"
_IN_METADATA = {"SSD-1B": r"ssd[-_]?1b", "Segmind Vega": r"\bvega\b|segmind[-_]vega"}


@dataclass(frozen=True)
class Origin:
    """The model that a LoRA was trained on, its name, and the evidence."""

    layout: Layout
    model: str
    evidence: str


@dataclass(frozen=True)
class Suspect:
    """A layout that a LoRA may have been trained on, and its name."""

    layout: Layout
    model: str


def origin_of(
    file: str,
    modules: Mapping[str, Made | None],
    metadata: Mapping[str, str],
    target: Layout,
    trained_on: TrainedOn,
) -> Origin:
    """Tell which model a LoRA was trained on, by the modules that are known in any model of SDXL's family.

    Names and shapes that one model alone has are proof. Where several have them all, a LoRA that changes exactly one
    model's transformer blocks is that model's; failing that, its metadata counts; failing that, SDXL is assumed.

    Args:
        file: its name, for messages.
        modules: its modules of the U-Net, each with what its tensors make, None where they make nothing.
        metadata: of the file.
        target: layout of the model that it is to be applied to.
        trained_on: what the person chose.

    Raises CheckpointError for a LoRA of another model, saying which.
    """
    _refuse_other_family(file, modules, target)
    sdxl, own = Suspect(at_widths_of(target, SDXL), "SDXL"), Suspect(target, name(target))
    if trained_on != "auto":
        return Origin(sdxl.layout, "SDXL", CHOSEN) if trained_on == "SDXL" else Origin(target, own.model, CHOSEN)
    relatives = [Suspect(at_widths_of(target, layout), model) for layout, model in _RELATIVES.items()]
    everyone = [own, sdxl, *(relative for relative in relatives if relative.layout != target)]
    known = {module: made for module, made in modules.items() if any(find(s.layout, module) for s in everyone)}
    misfits = {suspect.model: _misfits(known, suspect.layout) for suspect in everyone}
    fewest = min(map(len, misfits.values()))
    fitting = [suspect for suspect in everyone if len(misfits[suspect.model]) == fewest]
    if exact := next((s for s in fitting if s != sdxl and _changed(known, s.layout) == _transformers(s.layout)), None):
        if exact == own:
            return Origin(target, own.model, message("it has exactly {model}'s transformer blocks", model=own.model))
        raise _of_relative(file, exact.model, own.model, "it has exactly its transformer blocks")
    return _of_several(file, _stated(metadata), fitting, own, sdxl, misfits)


def _of_several(
    file: str,
    stated: str,
    fitting: list[Suspect],
    own: Suspect,
    sdxl: Suspect,
    misfits: Mapping[str, Mapping[str, str]],
) -> Origin:
    """The origin of a LoRA that changes no model's transformer blocks exactly, by what the fitting models lack."""
    if own in fitting and sdxl not in fitting:
        first, problem = next(iter(misfits["SDXL"].items()))
        evidence = (
            message("it has layers by {model}'s own numbers, such as {layer}", model=own.model, layer=first)
            if problem == _ABSENT
            else message("it has a shape that SDXL lacks, such as {layer}", layer=first)
        )
        return Origin(own.layout, own.model, evidence)
    said = message('its metadata says "{text}"', text=stated)
    named = next(
        (s for s in fitting if s != sdxl and re.search(_IN_METADATA.get(s.model, "koala"), stated, re.I)), None
    )
    if named == own:
        return Origin(own.layout, own.model, said)
    if named:
        raise _of_relative(file, named.model, own.model, said)
    others = [suspect.model for suspect in fitting if suspect not in (own, sdxl)]
    if sdxl not in fitting:
        raise _of_relative(file, " or ".join(others), own.model, "it has layers that SDXL lacks")
    assumed = message("assumed ({metadata})", metadata=said) if stated else message("assumed")
    if own in fitting:
        proof = message(
            "{assumed}, as {model} has all of its layers, too; choose KOALA if that is wrong",
            assumed=assumed,
            model=own.model,
        )
        return Origin(sdxl.layout, "SDXL", proof)
    first, problem = next(iter(misfits[own.model].items()))
    if problem == _ABSENT:
        proof = message("it has layers that {model} lacks, such as {layer}", model=own.model, layer=first)
    else:
        proof = message("its {layer} has the shape of SDXL's", layer=first)
    if others:
        proof = message(
            "{assumed}: {evidence}; {models} would fit, too", assumed=assumed, evidence=proof, models=", ".join(others)
        )
    return Origin(sdxl.layout, "SDXL", proof)


def _misfits(known: Mapping[str, Made | None], layout: Layout) -> dict[str, str]:
    """The modules that a layout lacks or has in another shape -> what is wrong with them, first those it lacks."""
    absent, misshapen = {}, {}
    for module, made in known.items():
        weight = find(layout, module)
        if weight is None:
            absent[module] = _ABSENT
        elif made is not None and not made.fits(weight.shape):
            misshapen[module] = "of another shape"
    return absent | misshapen


def _of_relative(file: str, model: str, own: str, evidence: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is a LoRA for {model} ({evidence}); expected one for SDXL or for {own}. Use it with that model."
    )


def _stated(metadata: Mapping[str, str]) -> str:
    """What a LoRA's metadata say of the model that it was trained on."""
    return ", ".join(dict.fromkeys(metadata[key][:80] for key in _METADATA if metadata.get(key)))


def _changed(known: Mapping[str, Made | None], layout: Layout) -> set[str]:
    """The transformer blocks that a LoRA changes, by their names in ``layout``."""
    found = (find(layout, module) for module in known)
    return _blocks_of(tensor.diffusers for tensor in found if tensor)


@cache
def _transformers(layout: Layout) -> set[str]:
    return _blocks_of(tensor.diffusers for tensor in tensors(layout))


def _blocks_of(names: Iterable[str]) -> set[str]:
    return {found[0] for known in names if (found := re.match(r".+transformer_blocks\.\d+", known))}


def _refuse_other_family(file: str, modules: Mapping[str, Made | None], target: Layout) -> None:
    """Raise CheckpointError for a LoRA that was made for another family of models than SDXL's."""
    both = f"SDXL or for {name(target)}" if target.context == SDXL.context else f"{name(target)} or an SDXL as narrow"
    expected = f"expected a LoRA for {both}. Use it with a model of its own kind."
    widths = Counter(
        made.columns for module, made in modules.items() if made and made.columns and _CONTEXT.search(module)
    )
    if widths and target.context not in widths:
        width = widths.most_common(1)[0][0]
        kind = FAMILIES_BY_TEXT_WIDTH.get(width, "another model")
        raise CheckpointError(f"{file} is a LoRA for {kind} (text width {width}, not {target.context}); {expected}")
    flat = [module.replace(".", "_") for module in modules]
    for family_name, pattern in _FAMILIES:
        if any(re.search(pattern, module) for module in flat):
            raise CheckpointError(f"{file} is a LoRA for {family_name}; {expected}")
    sdxl = at_widths_of(target, SDXL)
    if not any(find(layout, module) for module in modules for layout in (sdxl, target)):
        if any(_TEXT_ENCODER.search(module) for module in modules):
            raise CheckpointError(
                f"{file} is a LoRA of a CLIP text encoder, and its names do not say of which of SDXL's two; expected "
                f"names that begin with text_encoder. (CLIP-L) or text_encoder_2. (CLIP-G). Save it with such names."
            )
        first = ", ".join(sorted(modules)[:3])
        raise CheckpointError(
            f"{file} is a LoRA for an unknown model (none of its {len(modules)} modules is SDXL's; first: {first}); "
            f"{expected}"
        )
