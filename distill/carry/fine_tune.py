"""What is carried over, where it is a fine-tuned SDXL: its differences from SDXL, read one tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...koala.architecture.keys import tensors
from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage
from ...koala.lora.fit import low_rank
from ...koala.lora.kinds import ALPHA, DOWN, UP
from ..errors import UserError
from ..teacher import Teacher
from .names import text_names
from .weights import Weight, WeightChange

RANK = 32
"""Of the text encoders' part; that of the U-Net's is twice as large, if not chosen."""
SHOWN = 3
"""How many tensors that are left out are named."""
KINDS = {"embedding": "embeddings", "norm": "of norms", "text_projection": "projection", ".bias": "biases"}
"""What is in a parameter's name, in the order in which it is looked for, and what it is called."""


@dataclass(frozen=True)
class FineTune(WeightChange):
    """A fine-tuned SDXL and the SDXL that it is compared with."""

    tuned: Teacher
    base: Teacher
    lineage: Lineage
    rank: int = RANK

    @property
    def files(self) -> list[Path]:
        """Those that are read, that with its U-Net first."""
        return self.tuned.files

    @property
    def layout(self) -> Layout:
        return self.lineage.student

    @property
    def places(self) -> set[str]:
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

    def of_teacher(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        for parameter in self.tuned.file.names:
            yield parameter, self.tuned.file.tensor(parameter)

    def of_student(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """The differences of the layers that the KOALA's came from."""
        for part, whole in self.lineage.tensors:
            tuned, base = (model.file.tensor(whole.diffusers).float() for model in (self.tuned, self.base))
            yield part.diffusers, tuned - base

    def texts(self, pipeline: Any) -> tuple[dict[str, Tensor], str]:
        """Give diffusers' pipeline the fine-tune's text encoders; their linear layers' differences, for a file, and how
        much of the whole that is, in words."""
        tuned, every = self.tuned.pipeline(), list[Difference]()
        for part, encoder in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
            old, new = getattr(pipeline, part), getattr(tuned, part)
            every += differences(old, new, encoder)
            old.load_state_dict(new.state_dict())
        return text_names({name: tensor for one in every for name, tensor in one.factors.items()}), kept(every)


@dataclass(frozen=True)
class Difference:
    """One parameter of a text encoder that a fine-tune changed."""

    parameter: str
    """Its name behind that of the encoder."""
    factors: Mapping[str, Tensor]
    """What the file gets of it, as a LoRA under ComfyUI's names; nothing, where it is not the weight of a linear layer
    inside a transformer block."""
    size: float
    """Sum of squares."""
    missing: float
    """The same of what the factors lack."""


def differences(old: nn.Module, new: nn.Module, encoder: str) -> Iterator[Difference]:
    """What a fine-tune changed in a text encoder; ``encoder``: ComfyUI's name of it."""
    others = dict(new.named_parameters())
    linear = {name for name, layer in old.named_modules() if isinstance(layer, nn.Linear) and "layers." in name}
    for parameter, weight in old.named_parameters():
        change = others[parameter].detach().cpu() - weight.detach().cpu()
        if not change.any():
            continue
        own, factors, missing = parameter.removeprefix("text_model."), dict[str, Tensor](), change
        if parameter.endswith(".weight") and parameter.removesuffix(".weight") in linear:
            known = f"text_encoders.{encoder}.transformer.text_model.{own.removesuffix('.weight')}"
            up, down = (part.half() for part in low_rank(change, min(RANK, *change.shape)))
            factors = {known + UP: up, known + DOWN: down, known + ALPHA: torch.tensor(float(len(down)))}
            missing = change - up.float() @ down.float()
        yield Difference(f"{encoder}.{own}", factors, _squares(change), _squares(missing))


def kept(every: Sequence[Difference]) -> str:
    """How much of a fine-tune's text encoders the file gets, in words."""
    inside, left_out = ([one for one in every if bool(one.factors) == held] for held in (True, False))
    if not inside and not left_out:
        return "text encoders: as SDXL's"
    said = f"text encoders: the weights of {len(inside)} linear layers"
    if inside:
        share = 1 - sum(one.missing for one in inside) / sum(one.size for one in inside)
        said += f", of whose change (sum of squares) rank {RANK} keeps {100 * share:.1f} %"
    if not left_out:
        return said
    kinds = Counter(_kind(one.parameter) for one in left_out)
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    named = ", ".join(one.parameter for one in left_out[:SHOWN])
    more = ", ..." if len(left_out) > SHOWN else ""
    return f"{said}; left out, though changed: {counts} ({named}{more})"


def _kind(parameter: str) -> str:
    return next((kind for mark, kind in KINDS.items() if mark in parameter), "others")


def _squares(tensor: Tensor) -> float:
    return float(tensor.float().square().sum())


def require_other(tuned: Teacher, base: Teacher) -> None:
    """Raises UserError where a fine-tune has other widths than SDXL, or is the same file."""
    if tuned.layout != base.layout:
        raise UserError(
            f"{tuned.table.model} is a {name(tuned.layout)}, --teacher a {name(base.layout)}; expected a fine-tune of "
            f"the teacher. Give another one, or another --teacher."
        )
    if tuned.file.path.resolve() == base.file.path.resolve():
        raise UserError(f"{tuned.table.model} is --teacher itself; expected a fine-tune of it, or a LoRA.")
