"""What is carried over, where it is a fine-tuned SDXL: its differences from SDXL, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...koala.architecture.keys import tensors
from ...koala.architecture.layout import name
from ...koala.architecture.lineage import Lineage
from ...koala.lora.fit import low_rank
from ...koala.lora.kinds import ALPHA, DOWN, UP
from ..errors import UserError
from ..teacher import Teacher
from .names import text_names

RANK = 32
"""Of the text encoders' part; that of the U-Net's is twice as large, if not chosen."""


@dataclass(frozen=True)
class FineTune:
    """A fine-tuned SDXL and the SDXL that it is compared with."""

    tuned: Teacher
    base: Teacher
    lineage: Lineage
    rank: int = RANK

    @property
    def path(self) -> Path:
        """The file with its U-Net."""
        return self.tuned.file.path

    @property
    def places(self) -> set[str]:
        """ComfyUI's names of the KOALA's modules."""
        every = (tensor.comfy for tensor in tensors(self.lineage.student))
        return {known.removesuffix(".weight") for known in every if known.endswith(".weight")}

    def report(self) -> str:
        """What is carried over."""
        student, teacher = self.lineage.student, self.lineage.teacher
        return (
            f"{self.tuned.name}: a fine-tuned SDXL; its differences from {self.base.name} in {len(tensors(student))} "
            f"tensors of the U-Net begin the LoRA on {name(student)}, "
            f"{len(tensors(teacher)) - len(tensors(student))} are of layers that it lacks"
        )

    def of_teacher(self, weight: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The fine-tune's weights and biases, one at a time."""
        for parameter in self.tuned.file.names:
            yield parameter, self.tuned.file.tensor(parameter)

    def of_student(self, weight: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The differences of the layers that the KOALA's came from, fp32, one at a time."""
        for part, whole in self.lineage.tensors:
            tuned, base = (model.file.tensor(whole.diffusers).float() for model in (self.tuned, self.base))
            yield part.diffusers, tuned - base

    def texts(self, pipeline: Any) -> dict[str, Tensor]:
        """Give diffusers' pipeline the fine-tune's text encoders; their linear layers' differences, for a file."""
        tuned, found = self.tuned.pipeline(), dict[str, Tensor]()
        for part, encoder in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
            old, new = getattr(pipeline, part), getattr(tuned, part)
            found |= _differences(old, new, f"text_encoders.{encoder}.transformer.")
            old.load_state_dict(new.state_dict())
        return text_names(found)


def _differences(old: nn.Module, new: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What a fine-tune changed in a text encoder's layers, as a LoRA under ComfyUI's names."""
    found: dict[str, Tensor] = {}
    others = dict(new.named_modules())
    for module, layer in old.named_modules():
        if not isinstance(layer, nn.Linear) or "layers." not in module:
            continue
        change = others[module].weight.detach().cpu() - layer.weight.detach().cpu()
        if change.any():
            up, down = low_rank(change, min(RANK, *change.shape))
            known = f"{prefix}text_model.{module.removeprefix('text_model.')}"
            found |= {known + UP: up.half(), known + DOWN: down.half(), known + ALPHA: torch.tensor(float(len(down)))}
    return found


def require_other(tuned: Teacher, base: Teacher) -> None:
    """Raises UserError where a fine-tune has other widths than SDXL, or is the same file."""
    if tuned.layout != base.layout:
        raise UserError(
            f"{tuned.table.model} is a {name(tuned.layout)}, --teacher a {name(base.layout)}; expected a fine-tune of "
            f"the teacher. Give another one, or another --teacher."
        )
    if tuned.file.path.resolve() == base.file.path.resolve():
        raise UserError(f"{tuned.table.model} is --teacher itself; expected a fine-tune of it, or a LoRA.")
