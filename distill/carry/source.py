"""What is carried over: an SDXL LoRA, the SDXL, the KOALA, and what becomes of each of the LoRA's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage, is_teacher, lineage
from ...koala.files.config import stated_transformers
from ...koala.files.header import CheckpointError, read_header
from ...koala.files.unet_weights import UNetWeights, open_unet
from ...koala.lora.kinds import BIASES, DORA_SCALE, DOWN, split
from ...koala.lora.plan import Plan, inspect_lora
from ...koala.lora.report import summary, text_summary
from ...koala.lora.weights import Loaded, load
from .. import result
from ..config import TeacherTable
from ..errors import UserError
from ..teacher import Teacher, open_teacher
from .changes import changed_module, changed_weights, grouped
from .settings import LEAST_RANK, Settings

FULL = 32
"""What stands for the rank of a change that has none to speak of: of a LoHa, LoKr, DoRA, OFT, or whole difference."""
VECTORS = frozenset({*BIASES, ".w_norm"})
"""Tensors of changes of norms and biases, which have no rank."""


@dataclass(frozen=True)
class Source:
    """Both models' files, and where the LoRA's modules go in each; headers only."""

    teacher: Teacher
    student: UNetWeights
    lineage: Lineage
    on_teacher: Plan
    on_student: Plan

    def rank(self, given: Settings) -> int:
        """Of the new LoRA."""
        return given.rank or max(LEAST_RANK, 2 * own_rank(self.on_student))

    def report(self) -> str:
        """Where the LoRA's modules go on the KOALA by lineage, and what is left out."""
        return str(summary(self.on_student, str(text_summary(self.on_student))))


def open_source(given: Settings) -> Source:
    """Read the headers of all files. Raises UserError or CheckpointError for what cannot be used."""
    if not given.lora.is_file():
        raise UserError(f"{given.lora} is not a file; expected an SDXL LoRA, a .safetensors file. Give another one.")
    table = TeacherTable(model=given.teacher, tokenizer=given.tokenizer or "teacher", dtype=given.dtype)
    try:
        teacher = open_teacher(table)
    except UserError as error:
        said = str(error).replace("teacher.model:", "--teacher:").replace("teacher.tokenizer:", "--tokenizer:")
        raise UserError(said) from None
    student = _open_student(given.student, teacher.layout)
    line = lineage(student.layout, stated_transformers(read_header(student.path), student.layout))
    try:
        line.require_transformers()
        on_student = inspect_lora(given.lora, student.layout, kept_transformers=line.transformers)
    except ValueError as error:
        raise UserError(f"--student: {given.student}: {error}") from None
    _require_sdxls(given.lora, on_student, student.layout)
    return Source(teacher, student, line, inspect_lora(given.lora, teacher.layout, "SDXL"), on_student)


def _open_student(path: Path, teacher: Layout) -> UNetWeights:
    if not path.exists():
        raise UserError(f"--student: {path} does not exist; expected a KOALA, a folder or a .safetensors file.")
    try:
        student = open_unet(path, "KOALA")
    except CheckpointError as error:
        raise UserError(f"--student: {error}") from None
    layout = student.layout
    if is_teacher(layout):
        raise UserError(f"--student: {path} is a {name(layout)}; expected a KOALA, which has fewer layers.")
    if (layout.channels, layout.context, layout.added) != (teacher.channels, teacher.context, teacher.added):
        raise UserError(
            f"--student: {path} is a {name(layout)}, of other widths than the teacher, a {name(teacher)}; expected "
            f"a KOALA that was cut out of a model as wide. Give another one, or another --teacher."
        )
    return student


def _require_sdxls(path: Path, plan: Plan, student: Layout) -> None:
    """Raises UserError for a LoRA of which nothing is to be carried over."""
    if plan.origin is None:
        raise UserError(
            f"{path} changes text encoders alone, which a KOALA has from SDXL unchanged; expected a LoRA with a U-Net "
            f"part. Use it as it is."
        )
    if plan.origin.layout == student:
        raise UserError(
            f"{path} was trained on {plan.origin.model} itself ({plan.origin.evidence}); expected an SDXL LoRA. Use it "
            f"as it is."
        )
    if not plan.count("applied"):
        raise UserError(
            f"{path} changes layers alone that {name(student)} lacks or that cannot be read "
            f"({len(plan.modules)} modules); expected at least one that it has. There is nothing to begin with."
        )


def own_rank(plan: Plan) -> int:
    """The largest rank of the U-Net's modules that are applied; ``FULL`` for kinds whose changes have none."""
    shapes = read_header(plan.path).shapes
    ranks = [0]
    for module in plan.modules:
        tensors = {split(old)[1]: old for old in module.names}
        if DOWN in tensors and DORA_SCALE not in tensors:
            ranks.append(shapes[tensors[DOWN]][0])
        elif tensors.keys() - VECTORS:
            ranks.append(FULL)
    return max(ranks)


def student_unet(source: Source) -> UNet2DConditionModel:
    """The KOALA's U-Net, fp32, frozen; not to be changed in place, see ``put``."""
    return result.unet(source.lineage, source.student.weights(torch.float32))


def by_lineage(source: Source) -> Iterator[tuple[str, Tensor]]:
    """What the LoRA adds to each weight and bias of the KOALA by lineage, fp32, one at a time."""
    for weight, new in changed_weights(load(source.on_student).unet, source.student.layout, source.student.tensor):
        yield weight, new - source.student.tensor(weight).float()


@contextmanager
def merged(unet: UNet2DConditionModel, source: Source) -> Iterator[None]:
    """SDXL's U-Net has the LoRA merged while this is active, each weight in fp32 before it is rounded."""
    changed, file = [], source.teacher.file
    for parameter, new in changed_weights(load(source.on_teacher).unet, source.teacher.layout, file.tensor):
        put(unet, parameter, new)
        changed.append(parameter)
    try:
        yield
    finally:
        for parameter in changed:
            put(unet, parameter, file.tensor(parameter))


def put(unet: UNet2DConditionModel, parameter: str, value: Tensor) -> None:
    """Give a U-Net another weight or bias. Not in place: the one before may be the file itself, mapped into memory."""
    own = unet.get_parameter(parameter)
    own.data = value.to(own.device, own.dtype)


def changed_texts(pipeline: Any, loaded: Loaded) -> None:
    """Merge the LoRA into the text encoders of diffusers' pipeline, in place."""
    parameters = {
        f"{encoder}.transformer.{parameter.removeprefix('text_model.')}": tensor
        for encoder, model in (("clip_l", pipeline.text_encoder), ("clip_g", pipeline.text_encoder_2))
        for parameter, tensor in model.named_parameters()
    }
    for module, parts in grouped(loaded.text).items():
        known = module.removeprefix("text_encoders.").replace(".transformer.text_model.", ".transformer.")
        if f"{known}.weight" not in parameters:  # CLIP-L's projection, which SDXL does not use
            continue
        for parameter, new in changed_module(parts, known, parameters.__getitem__):
            parameters[parameter].data.copy_(new)
