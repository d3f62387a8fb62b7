"""The KOALA with a LoRA or ControlNet whose numbers can be set: its outputs on samples, and how they change with those.

Outputs are weighted as errors of velocity are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from ...koala.lora.adjustable import Adjustable
from ...koala.lora.fit import Changes
from .. import losses
from ..config import LossTable
from .samples import Acts, Samples, Texts, alone, output
from .settings import Settings


@dataclass(frozen=True)
class Learner:
    """What is learned for a KOALA."""

    start: Changes
    """The numbers to begin with."""
    places: Adjustable
    """Where they are in its U-Net, or beside it."""
    acts: Acts = alone


class Student:
    """A KOALA's U-Net with the places of the numbers."""

    def __init__(
        self, unet: UNet2DConditionModel, learner: Learner, texts: Texts, noise: DDPMScheduler, given: Settings
    ) -> None:
        self.unet, self.learner, self.texts, self.given = unet, learner, texts, given
        unet.enable_gradient_checkpointing()
        self.weights = losses.time_weights(
            LossTable(weighting="velocity"), noise, torch.arange(noise.config.num_train_timesteps)
        ).sqrt()

    def outputs(self, changes: Changes, samples: Samples) -> Tensor:
        """The outputs with these numbers, times the square root of their weight in velocity's error; fp32, CPU."""
        parts = self._parts(samples)
        return self.learner.places.outputs(changes, lambda part: self._weighted(samples.pick(part)), parts)

    def slopes(self, changes: Changes, samples: Samples, error: Callable[[Tensor, Tensor], Tensor]) -> Changes:
        """The transposed Jacobian of ``outputs`` times an error; see ``Adjustable.slopes``."""
        parts = self._parts(samples)
        return self.learner.places.slopes(changes, lambda part: self._weighted(samples.pick(part)), error, parts)

    def _weighted(self, samples: Samples) -> Tensor:
        found = output(self.unet, samples, self.texts.with_lora, self.given, self.learner.acts)
        return found * self.weights[samples.time].to(found.device).view(-1, 1, 1, 1)

    def _parts(self, samples: Samples) -> tuple[Tensor, ...]:
        return torch.arange(len(samples.time)).split(self.given.batch)
