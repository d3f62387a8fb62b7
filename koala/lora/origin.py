"""Which model a LoRA was trained on: SDXL, a KOALA, a relative of theirs, or something else altogether."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ..architecture.keys import Shape, tensors
from ..architecture.layout import SDXL, SSD_1B, VEGA, Layout, name
from ..architecture.lineage import KEPT_TRANSFORMERS, at_widths_of
from ..files.header import CheckpointError
from ..files.other_models import FAMILIES_BY_TEXT_WIDTH
from .names import Groups, aliases, fits, size

TrainedOn = Literal["auto", "SDXL", "KOALA"]

_CONTEXT = re.compile(r"attn2[._](?:processor\.)?to_[kv]$")

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


@dataclass(frozen=True)
class Origin:
    """The model that a LoRA was trained on, its name, and the evidence."""

    layout: Layout
    model: str
    evidence: str


_RELATIVES: dict[Layout, str] = {
    SSD_1B: "SSD-1B",
    VEGA: "Segmind Vega",
    **{layout: name(layout) for layout in KEPT_TRANSFORMERS},
}


def origin_of(
    file: str,
    groups: Groups,
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    target: Layout,
    trained_on: TrainedOn,
) -> Origin:
    """Tell SDXL's LoRAs from KOALA's own by the transformer blocks that they name.

    Args:
        file: its name, for messages.
        groups: its modules of the U-Net.
        shapes: of its tensors.
        metadata: of the file.
        target: layout of the model that it is to be applied to.
        trained_on: what the person chose.

    Raises CheckpointError for a LoRA of another model, saying which.
    """
    _refuse_other_family(file, groups, shapes, target)
    sdxl, own = at_widths_of(target, SDXL), name(target)
    if trained_on != "auto":
        return Origin(sdxl, "SDXL", "as chosen") if trained_on == "SDXL" else Origin(target, own, "as chosen")
    for layout, relative in _RELATIVES.items():
        if not _is_for(groups, at_widths_of(target, layout)):
            continue
        if at_widths_of(target, layout) == target:
            return Origin(target, own, f"it has exactly {own}'s transformer blocks")
        raise CheckpointError(
            f"{file} is a LoRA for {relative} (it has exactly its transformer blocks); expected one for SDXL or "
            f"for {own}. Use it with that model."
        )
    only_own = next((module for module in groups if module in aliases(target) and module not in aliases(sdxl)), None)
    if only_own:
        return Origin(target, own, f"it has layers by {own}'s own numbers, such as {only_own}")
    return Origin(sdxl, "SDXL", _evidence_of_sdxl(groups, shapes, metadata, target))


def _evidence_of_sdxl(groups: Groups, shapes: Mapping[str, Shape], metadata: Mapping[str, str], target: Layout) -> str:
    known, own = aliases(target), name(target)
    absent = next(
        (module for module in groups if module in aliases(at_widths_of(target, SDXL)) and module not in known), None
    )
    if absent:
        return f"it has layers that {own} lacks, such as {absent}"
    misshapen = (
        module
        for module, suffixes in groups.items()
        if module in known and not fits(suffixes, shapes, known[module].shape)
    )
    if first := next(misshapen, None):
        return f"its {first} has the shape of SDXL's"
    base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    stated = f' (its metadata says "{base}")' if base else ""
    return f"assumed{stated}, as {own} has all of its layers, too; choose KOALA if that is wrong"


def _is_for(groups: Groups, layout: Layout) -> bool:
    """True for a LoRA with exactly the transformer blocks of ``layout`` and no module that it lacks."""
    return _changed_transformers(groups, layout) == _transformers(layout) and all(
        module in aliases(layout) for module in groups
    )


def _changed_transformers(groups: Groups, layout: Layout) -> set[str]:
    """The transformer blocks that a LoRA changes, by their names in ``layout``."""
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
        found[1]
        for module, suffixes in groups.items()
        if _CONTEXT.search(module) and (found := size({suffix: shapes[key] for suffix, key in suffixes.items()}))
    )
    if widths and target.context not in widths:
        width = widths.most_common(1)[0][0]
        kind = FAMILIES_BY_TEXT_WIDTH.get(width, "another model")
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
