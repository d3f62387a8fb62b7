"""The compact U-Net before training: which of the teacher's layers it keeps, and its initial weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from ..koala.architecture.keys import tensors
from ..koala.architecture.layout import SDXL, Layout, name
from ..koala.architecture.lineage import (
    KEPT_LAYERS,
    KeptTransformers,
    Lineage,
    at_widths_of,
    attention_depths,
    check_kept,
    depths_in_teacher,
    is_teacher,
)
from ..koala.architecture.lineage import lineage as lineage_of
from ..koala.files.export import unet_config
from ..koala.files.header import CheckpointError
from ..koala.files.unet_weights import open_unet
from .config import NAMED_LAYOUTS, StudentTable
from .errors import UserError

RULES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "first": lambda depth, full: tuple(range(depth)),
    "even": lambda depth, full: tuple(index * (full - 1) // max(1, depth - 1) for index in range(depth)),
}
"""Key ``student.transformers`` -> function of the student's and the teacher's depth: the teacher's indices."""


def plan(table: StudentTable, teacher: Layout, kept: KeptTransformers | None = None) -> Lineage:
    """Which of SDXL's layers each layer of the configuration's student comes from.

    Args:
        table: the student.
        teacher: its teacher's layout: SDXL's, of which it keeps a part, or a KOALA's, which is then its own as well.
        kept: which of SDXL's transformer blocks a KOALA teacher's file says that it kept.

    Raises UserError naming the tensor or module where it is not a sub-network of the teacher.
    """
    chosen = table.layout
    layout = NAMED_LAYOUTS[chosen] if isinstance(chosen, str) else Layout(**chosen.model_dump())
    if not (layout.down and all((*layout.down, *layout.up))):
        raise UserError(
            "student.layout: a stage has no layers; expected three stages down and up, each with layers. Add them."
        )
    try:
        unet_config(layout)  # diffusers cannot train what it cannot describe
        if not is_teacher(teacher):
            return _itself(at_widths_of(teacher, layout), teacher, kept)
        return cut_out(at_widths_of(teacher, layout), table.transformers)
    except ValueError as error:
        raise UserError(
            f"student.layout: the {name(layout)} cannot be cut out of the teacher: {error}. Change the layout, or "
            f"student.transformers."
        ) from None


def _itself(layout: Layout, teacher: Layout, kept: KeptTransformers | None) -> Lineage:
    """The lineage of a student with its teacher's layers. Raises ValueError where it has others."""
    if layout != teacher:
        raise ValueError(f"the teacher is a {name(teacher)}, and only SDXL can be cut; expected the teacher's layers")
    return lineage_of(layout, kept)


def cut_out(layout: Layout, transformers: str | KeptTransformers) -> Lineage:
    """The lineage of a sub-network of SDXL, at any width; ``transformers`` is a key of ``RULES``, or the table itself.

    Raises ValueError naming the tensor or module where the layout is not a sub-network, or the table does not fit it.
    """
    for direction, fewer in KEPT_LAYERS.items():
        counts, full = ([len(stage) for stage in getattr(which, direction)] for which in (layout, SDXL))
        if len(counts) != len(full) or any(n not in (len(fewer), all_) for n, all_ in zip(counts, full, strict=True)):
            raise ValueError(f"its {direction} stages have {counts} layers; expected {len(fewer)} or {full}")
    depths, teacher_depths = attention_depths(layout), depths_in_teacher(layout)
    for module, depth in depths.items():
        if depth > teacher_depths[module]:
            block = f"{module}.transformer_blocks.{teacher_depths[module]}."
            first = next(one.diffusers for one in tensors(layout) if one.diffusers.startswith(block))
            ancestor = Lineage(layout, {}).ancestor(module)
            raise ValueError(
                f"{first} would come from block {teacher_depths[module]} of the teacher's {ancestor}, which has only "
                f"{teacher_depths[module]}"
            )
    if isinstance(transformers, str):
        transformers = {module: RULES[transformers](depth, teacher_depths[module]) for module, depth in depths.items()}
    check_kept(layout, transformers)
    lineage = Lineage(layout, dict(transformers))
    for tensor, origin in lineage.tensors:
        if tensor.shape != origin.shape:
            raise ValueError(f"{tensor.diffusers} is {list(tensor.shape)}, {origin.diffusers} {list(origin.shape)}")
    return lineage


def build(lineage: Lineage, start: str | Path, teacher: UNet2DConditionModel, seed: int) -> UNet2DConditionModel:
    """The student in fp32 with its initial weights; ``start`` is the configuration's key.

    Raises UserError where ``start`` is a file or folder without a U-Net of the student's layout.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(unet_config(lineage.student))
    if start == "teacher":
        weights = teacher.state_dict()
        if weights.keys() != unet.state_dict().keys():  # a teacher with the student's own layers is taken as it is
            weights = lineage.cut(weights, "diffusers")
        unet.load_state_dict({key: value.float() for key, value in weights.items()})
    elif start != "random":
        try:
            earlier = open_unet(Path(start), "a student")
        except CheckpointError as error:
            raise UserError(f"student.start: {error}") from None
        if earlier.layout != lineage.student:
            raise UserError(
                f"student.start: {start} is a {name(earlier.layout)}; expected a {name(lineage.student)}, as "
                f"student.layout says. Give a student of the same layout."
            )
        unet.load_state_dict(earlier.weights(torch.float32))
    return unet
