"""What the KOALA's LoRA or ControlNet is to do on the samples, how much of that it does, and both ways to do more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...koala.lora.fit import Changes, fit_changes, reached
from ...koala.lora.learning import ITERATIONS
from ..errors import UserError
from . import refit as training
from .samples import Samples, State, Texts, as_samples, outputs, wanted
from .settings import FITTED, Settings
from .source import Source, student_unet
from .student import Student


@dataclass(frozen=True)
class Job:
    """The KOALA, and what its LoRA or ControlNet is to do on the samples; the last ``given.held_out`` are held out."""

    given: Settings
    student: Student
    start: Changes
    samples: Samples
    wanted: Tensor
    own: Tensor

    @classmethod
    def made(cls, given: Settings, source: Source, texts: Texts, learned: State, device: torch.device) -> Job:
        """``learned``: the samples, and what the LoRA or ControlNet changes in SDXL's outputs there."""
        samples, change = as_samples(learned), learned["change"]
        unet = student_unet(source).to(device)
        own = outputs(unet, samples, texts.plain, given)
        asked = wanted(own, change, samples.kept)
        learner = source.change.learner(unet, source.student, given)
        student = Student(unet, learner, texts, source.teacher.noise, given)
        weights = student.weights[samples.time].view(-1, 1, 1, 1)
        return cls(given, student, learner.start, samples, asked * weights, own * weights)

    @property
    def learned(self) -> Tensor:
        return torch.arange(self.given.samples)

    def share(self, numbers: Changes) -> float:
        """``reached`` on the held-out samples."""
        part = torch.arange(self.given.samples, len(self.wanted))
        wanted = self.wanted[part]
        return reached(wanted, self.student.outputs(numbers, self.samples.pick(part)), wanted - self.own[part])

    def fit(self, start: Changes) -> Changes:
        """The numbers after a round of least squares, on some of the samples of either network."""
        some = self.learned[:: -(-self.given.samples // FITTED)]
        samples = self.samples.pick(some)

        def adjoint(at: Changes, error: Tensor) -> Changes:
            return self.student.slopes(at, samples, lambda _, part: error[part])

        try:
            return fit_changes(
                lambda numbers: self.student.outputs(dict(numbers), samples),
                start,
                self.wanted[some],
                ITERATIONS,
                adjoint,
            ).changes
        except ValueError as error:
            raise UserError(f"the least squares fail: {error}") from None

    def refit(self, start: Changes, checkpoint: Path) -> Changes:
        """The numbers after further training."""
        samples, wanted = self.samples.pick(self.learned), self.wanted[self.learned]
        full = float((wanted - self.own[self.learned]).square().mean())
        return training.refit(self.student, start, samples, wanted, full, self.given, checkpoint)
