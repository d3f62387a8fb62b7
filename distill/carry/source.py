"""What is carried over, the SDXL, and the KOALA; opened, and their U-Nets as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage, is_teacher, lineage
from ...koala.files.config import stated_transformers
from ...koala.files.header import CheckpointError, read_header
from ...koala.files.unet_weights import UNetWeights, open_unet
from ...koala.lora.fit import Changes
from .. import result
from ..config import TeacherTable
from ..errors import UserError
from ..teacher import Teacher, open_teacher
from .fine_tune import FineTune, require_other
from .lora import open_lora
from .settings import LEAST_RANK, Settings


class Change(Protocol):
    """A LoRA or a fine-tune: what it makes of SDXL, and by lineage of the KOALA; see ``lora.Lora``."""

    @property
    def path(self) -> Path: ...
    @property
    def rank(self) -> int: ...
    @property
    def places(self) -> set[str]: ...
    def report(self) -> str: ...
    def of_teacher(self, weight: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]: ...
    def of_student(self, weight: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]: ...
    def texts(self, pipeline: Any) -> Changes: ...


@dataclass(frozen=True)
class Source:
    """What is carried over, and both models' files; headers only."""

    change: Change
    teacher: Teacher
    student: UNetWeights
    lineage: Lineage

    def rank(self, given: Settings) -> int:
        """Of the new LoRA."""
        return given.rank or max(LEAST_RANK, 2 * self.change.rank)


def open_source(given: Settings) -> Source:
    """Read the headers of all files. Raises UserError or CheckpointError for what cannot be used."""
    if not given.lora.exists():
        raise UserError(
            f"{given.lora} does not exist; expected an SDXL LoRA, a .safetensors file, or a fine-tuned SDXL."
        )
    teacher = _open_teacher(given.teacher, given, "--teacher: ")
    student = _open_student(given.student, teacher.layout)
    line = lineage(student.layout, stated_transformers(read_header(student.path), student.layout))
    try:
        line.require_transformers()
    except ValueError as error:
        raise UserError(f"--student: {given.student}: {error}") from None
    if not _has_unet(given.lora):
        return Source(open_lora(given.lora, line), teacher, student, line)
    tuned = _open_teacher(given.lora, given, "")
    require_other(tuned, teacher)
    return Source(FineTune(tuned, teacher, line), teacher, student, line)


def _open_teacher(path: Path, given: Settings, option: str) -> Teacher:
    table = TeacherTable(model=path, tokenizer=given.tokenizer or "teacher", dtype=given.dtype)
    try:
        return open_teacher(table)
    except UserError as error:
        said = str(error).replace("teacher.model: ", option).replace("teacher.tokenizer:", "--tokenizer:")
        raise UserError(said) from None


def _has_unet(path: Path) -> bool:
    """Whether a file or folder holds a U-Net; a LoRA does not."""
    try:
        open_unet(path, "SDXL")
    except CheckpointError:
        return path.is_dir()
    return True


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


def student_unet(source: Source) -> UNet2DConditionModel:
    """The KOALA's U-Net, fp32, frozen; not to be changed in place, see ``put``."""
    return result.unet(source.lineage, source.student.weights(torch.float32))


def by_lineage(source: Source) -> Iterator[tuple[str, Tensor]]:
    """What is added to each weight and bias of the KOALA by lineage, fp32, one at a time."""
    return source.change.of_student(source.student.tensor)


@contextmanager
def merged(unet: UNet2DConditionModel, source: Source) -> Iterator[None]:
    """SDXL's U-Net is changed while this is active, each weight in fp32 before it is rounded."""
    changed, file = [], source.teacher.file
    for parameter, new in source.change.of_teacher(file.tensor):
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
