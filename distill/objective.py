"""What the student is trained on: one forward pass of student and teacher, and the terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from . import losses
from .config import LossTable
from .features import FeatureRecorder, Pair


@dataclass(frozen=True)
class Objective:
    """Computes the terms of the loss for a batch."""

    table: LossTable
    dropout: float
    """Share of captions replaced by zeros."""
    noise: DDPMScheduler
    teacher: UNet2DConditionModel | None
    """None where only the error against the true noise counts."""
    pairs: tuple[Pair, ...]
    teacher_features: FeatureRecorder
    student_features: FeatureRecorder

    def errors(
        self,
        network: torch.nn.Module,
        batch: Mapping[str, torch.Tensor],
        generator: torch.Generator,
        time: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Each term of the loss before its factor, as scalars.

        Args:
            network: the student.
            batch: samples of the cache, stacked.
            generator: on the CPU; draws noise, time steps and dropped captions.
            time: int64 [n], time steps instead of those drawn.
        """
        latents = batch["latents"]
        count, device = len(latents), latents.device
        noise = torch.randn(latents.shape, generator=generator).to(device)
        if time is None:
            time = losses.time_steps(count, self.noise.config.num_train_timesteps, generator)
        time = time.to(device)
        with_caption = (torch.rand(count, generator=generator) >= self.dropout).float().to(device)
        noisy = self.noise.add_noise(latents, noise, time)
        given = conditions(batch, with_caption)
        teacher_output, wanted = None, {}
        if self.teacher is not None:
            dtype = self.teacher.dtype
            with torch.no_grad(), self.teacher_features.recording() as wanted:
                teacher_output = self.teacher(noisy.to(dtype), time, **cast(given, dtype)).sample
        with self.student_features.recording() as found:
            output = network(noisy, time, **given).sample
        feature_error = losses.feature_error(self.table, self.pairs, found, wanted).to(device)
        weights = losses.time_weights(self.table, self.noise, time)
        teacher_output = output.detach() if teacher_output is None else teacher_output
        return losses.terms(self.table, weights, noise, output, teacher_output, feature_error)


def conditions(batch: Mapping[str, torch.Tensor], with_caption: torch.Tensor) -> dict[str, Any]:
    """What a U-Net is told of a batch beside latents and time: captions times ``with_caption`` [n], which are zeros
    where that is 0, and sizes."""
    count = len(with_caption)
    return {
        "encoder_hidden_states": batch["context"] * with_caption.view(count, 1, 1),
        "added_cond_kwargs": {
            "text_embeds": batch["pooled"] * with_caption.view(count, 1),
            "time_ids": batch["ids"].long(),  # no cast to a smaller type touches them: bf16 rounds 1365 to 1368
        },
    }


def cast(given: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``conditions`` with their floating-point tensors in a type."""
    return {key: _cast_one(value, dtype) for key, value in given.items()}


def _cast_one(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return cast(value, dtype)
    return value.to(dtype) if value.is_floating_point() else value
