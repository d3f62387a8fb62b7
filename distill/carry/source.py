"""What is carried over, the SDXL, and the KOALA; opened, and their U-Nets as they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel

from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage, is_teacher, lineage
from ...koala.files.config import stated_transformers
from ...koala.files.control_weights import control_file
from ...koala.files.header import CheckpointError, read_header
from ...koala.files.unet_weights import UNetWeights, open_unet
from ...koala.lora.fit import Changes
from .. import result
from ..config import TeacherTable
from ..errors import UserError
from ..teacher import Teacher, open_teacher
from .control import open_change
from .fine_tune import FineTune, require_other
from .hints import Hints
from .lora import open_lora
from .samples import Acts
from .settings import Settings
from .student import Learner


class Change(Protocol):
    """A LoRA, a fine-tune or a ControlNet: what it does to SDXL, and what of that is learned for the KOALA."""

    @property
    def kind(self) -> str:
        """What is learned, in a word."""

    @property
    def files(self) -> list[Path]:
        """Those that are read, that with its weights first."""

    @property
    def hints(self) -> Hints | None:
        """The control images that it sees."""

    @property
    def bytes(self) -> int:
        """Of what is in memory beside either network."""

    def report(self) -> str:
        """What is carried over by lineage, and what is left out."""

    def count(self, given: Settings) -> int:
        """How many numbers are learned."""

    def result(self, given: Settings) -> str:
        """The new file in a word or two."""

    def texts(self, pipeline: Any) -> tuple[Changes, str]:
        """Change the text encoders of diffusers' pipeline, in place; the tensors of that part, for the new file, and
        what there is to tell of them."""

    def on_teacher(self, unet: UNet2DConditionModel, file: UNetWeights) -> AbstractContextManager[Acts]:
        """SDXL's U-Net, of this file, has it while this is active."""

    def on_student(self, unet: UNet2DConditionModel, file: UNetWeights) -> Acts:
        """Give the KOALA's U-Net, of this file, what lineage carries over."""

    def learner(self, unet: UNet2DConditionModel, file: UNetWeights, given: Settings) -> Learner:
        """The places of the numbers that are learned in the KOALA's U-Net, and what they begin with."""

    def rounded(self, numbers: Changes) -> Changes:
        """The numbers as the new file has them, fp32. Raises UserError for one that it cannot hold."""

    def write(self, path: Path, numbers: Changes, text: Changes, origin: Mapping[str, Any], given: Settings) -> None:
        """Write the new file, whole or not at all. ``text``: what ``texts`` returned. Raises UserError."""


@dataclass(frozen=True)
class Source:
    """What is carried over, and both models' files; headers only."""

    change: Change
    teacher: Teacher
    student: UNetWeights
    lineage: Lineage

    @property
    def files(self) -> dict[str, list[Path]]:
        """What is read of each model, by its option; weights first."""
        return {
            self.change.kind.lower(): self.change.files,
            "teacher": self.teacher.files,
            "student": [self.student.path],
        }


def open_source(given: Settings) -> Source:
    """Read the headers of all files. Raises UserError or CheckpointError for what cannot be used."""
    if not given.lora.exists():
        raise UserError(
            f"{given.lora} does not exist; expected an SDXL LoRA, a .safetensors file, a fine-tuned SDXL, or an SDXL "
            f"ControlNet."
        )
    teacher = _open_teacher(given.teacher, given, "--teacher: ")
    student = _open_student(given.student, teacher.layout)
    line = lineage(student.layout, stated_transformers(read_header(student.path), student.layout))
    if control := control_file(given.lora):
        return Source(open_change(control, teacher.layout, line, given), teacher, student, line)
    if given.hints:
        raise UserError(f"--hints goes with a ControlNet, and {given.lora} is none. Leave it out.")
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
        teacher = open_teacher(table)
        teacher.require_parts()
        return teacher
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
    """The KOALA's U-Net, fp32, frozen; not to be changed in place: it may be the file itself."""
    return result.unet(source.lineage, source.student.weights(torch.float32))
