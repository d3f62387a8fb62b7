"""The KOALA with a LoRA whose numbers can be set: its outputs on samples, weighted, and how they change with those."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from ...koala.lora.adjustable import Adjustable
from ...koala.lora.fit import Changes
from .. import losses
from ..config import LossTable
from .samples import Samples, Texts, output
from .settings import Settings


class Student:
    """A KOALA's U-Net with the factors' places; ``start`` says which, and of which rank."""

    def __init__(
        self, unet: UNet2DConditionModel, start: Changes, texts: Texts, noise: DDPMScheduler, given: Settings
    ) -> None:
        self.unet, self.texts, self.given = unet, texts, given
        unet.enable_gradient_checkpointing()
        self.network = Adjustable(unet, start)
        self.weights = losses.time_weights(
            LossTable(weighting="velocity"), noise, torch.arange(noise.config.num_train_timesteps)
        ).sqrt()

    def outputs(self, changes: Changes, samples: Samples) -> Tensor:
        """The outputs with these numbers, times the square root of their weight in velocity's error; fp32, CPU."""
        return self.network.outputs(changes, lambda part: self._weighted(samples.pick(part)), self._parts(samples))

    def slopes(self, changes: Changes, samples: Samples, error: Callable[[Tensor, Tensor], Tensor]) -> Changes:
        """The transposed Jacobian of ``outputs`` times an error; see ``Adjustable.slopes``."""
        parts = self._parts(samples)
        return self.network.slopes(changes, lambda part: self._weighted(samples.pick(part)), error, parts)

    def _weighted(self, samples: Samples) -> Tensor:
        found = output(self.unet, samples, self.texts.with_lora, self.given)
        return found * self.weights[samples.time].to(found.device).view(-1, 1, 1, 1)

    def _parts(self, samples: Samples) -> tuple[Tensor, ...]:
        return torch.arange(len(samples.time)).split(self.given.batch)
