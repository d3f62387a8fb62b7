"""What is carried over, where it is an SDXL LoRA of any kind: on SDXL, and by lineage on the KOALA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage
from ...koala.files.header import read_header
from ...koala.lora.kinds import BIASES, DORA_SCALE, DOWN, split
from ...koala.lora.plan import Plan, inspect_lora
from ...koala.lora.report import summary, text_summary
from ...koala.lora.weights import load
from ..errors import UserError
from .changes import changed_module, changed_weights, grouped
from .names import text_names
from .weights import Weight, WeightChange

FULL = 32
"""What stands for the rank of a change that has none to speak of: of a LoHa, LoKr, DoRA, OFT, or whole difference."""
VECTORS = frozenset({*BIASES, ".w_norm"})
"""Tensors of changes of norms and biases, which have no rank."""


@dataclass(frozen=True)
class Lora(WeightChange):
    """A LoRA's file, and where its modules go in each model."""

    teachers: Plan
    students: Plan

    @property
    def path(self) -> Path:
        """The file."""
        return self.students.path

    @property
    def files(self) -> list[Path]:
        """The same, alone."""
        return [self.path]

    @cached_property
    def rank(self) -> int:
        """The largest of the U-Net's modules that are applied; ``FULL`` for kinds whose changes have none."""
        shapes = read_header(self.path).shapes
        ranks = [0]
        for module in self.students.modules:
            tensors = {split(old)[1]: old for old in module.names}
            if DOWN in tensors and DORA_SCALE not in tensors:
                ranks.append(shapes[tensors[DOWN]][0])
            elif tensors.keys() - VECTORS:
                ranks.append(FULL)
        return max(ranks)

    @property
    def layout(self) -> Layout:
        return self.students.target

    @property
    def places(self) -> set[str]:
        applied = (module for module in self.students.modules if module.outcome == "applied")
        return {module.target.removeprefix("diffusion_model.") for module in applied}

    def report(self) -> str:
        """Where its modules go by lineage, and what is left out."""
        return str(summary(self.students, str(text_summary(self.students))))

    def of_teacher(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        return changed_weights(load(self.teachers).unet, self.teachers.target, weight)

    def of_student(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        for parameter, new in changed_weights(load(self.students).unet, self.students.target, weight):
            yield parameter, new - weight(parameter).float()

    def texts(self, pipeline: Any) -> tuple[dict[str, Tensor], str]:
        """Merge it into the text encoders of diffusers' pipeline, in place; the tensors of that part, for a file, and
        nothing that ``report`` does not say."""
        text = load(self.students).text
        parameters = {
            f"{encoder}.transformer.{parameter.removeprefix('text_model.')}": tensor
            for encoder, model in (("clip_l", pipeline.text_encoder), ("clip_g", pipeline.text_encoder_2))
            for parameter, tensor in model.named_parameters()
        }
        for module, parts in grouped(text).items():
            known = module.removeprefix("text_encoders.").replace(".transformer.text_model.", ".transformer.")
            if f"{known}.weight" in parameters:  # CLIP-L's projection is not: SDXL does not use it
                for parameter, new in changed_module(parts, known, parameters.__getitem__):
                    parameters[parameter].data = new
        return text_names(text), ""


def open_lora(path: Path, line: Lineage) -> Lora:
    """Read a LoRA's header. Raises UserError or CheckpointError for one of which nothing is to be carried over."""
    student = line.student
    on_student = inspect_lora(path, student, kept_transformers=line.transformers)
    _require_sdxls(path, on_student, student)
    return Lora(inspect_lora(path, line.teacher, "SDXL"), on_student)


def _require_sdxls(path: Path, plan: Plan, student: Layout) -> None:
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
