"""Step distillation: the student draws in a few steps without guidance what the teacher draws in many with it.

A sampler solves dz/dsigma = noise(z, sigma) from the largest sigma down to 0 (arXiv 2206.00364, with z the latents of
noise level sigma). One step of the student is to end where several guided steps of the teacher end that begin at the
same z: progressive distillation (arXiv 2202.00512) of a guided teacher (arXiv 2210.03142), in a single stage, as the
student's steps are known beforehand. Each z is one that the student reaches from pure noise by its own steps, as in
sampling, so that it also learns to correct its own errors: backward distillation (arXiv 2405.05224).

The student still predicts noise: the mean over its step. Euler's method takes it there, in any sampler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from . import losses
from .config import LossTable, StepsTable
from .objective import cast, conditions

Conditions = Mapping[str, Any]


class Grid(NamedTuple):
    """The steps of a sampler."""

    times: torch.Tensor
    """int64 [n]: the time step of each, of SDXL's 1000, falling."""
    sigmas: torch.Tensor
    """float32 [n + 1]: the noise level at which each begins, and 0."""


def grid(noise: DDPMScheduler, steps: int, each: int = 1) -> Grid:
    """``steps`` trailing steps, as KOALA-Lightning's samplers take them, each divided into ``each`` equal ones."""
    scheduler = EulerDiscreteScheduler.from_config(noise.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    ends = torch.cat([scheduler.timesteps, torch.tensor([-1.0])])  # -1: no noise
    inner = torch.arange(each) / each
    times = (ends[:-1, None] + (ends[1:] - ends[:-1])[:, None] * inner).round().long().flatten()
    kept = noise.alphas_cumprod[times]
    return Grid(times, torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1)]))


@dataclass(frozen=True)
class StepObjective:
    """Computes the error of one of the student's steps for a batch."""

    table: LossTable
    dropout: float
    """Share of captions replaced by zeros."""
    steps: StepsTable
    noise: DDPMScheduler
    teacher: UNet2DConditionModel

    @cached_property
    def _own(self) -> Grid:
        return grid(self.noise, self.steps.student)

    @cached_property
    def _teachers(self) -> Grid:
        return grid(self.noise, self.steps.student, self.steps.teacher)

    def errors(
        self,
        network: torch.nn.Module,
        batch: Mapping[str, torch.Tensor],
        generator: torch.Generator,
        time: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The mean squared difference between where the student's step and the teacher's end, in latents whose noise
        and image have a variance of 1 together; a scalar, by the name of its factor.

        Args:
            network: the student.
            batch: samples of the cache, stacked; of their latents only the shape counts.
            generator: on the CPU; draws noise, steps and dropped captions.
            time: int64 [n], time steps: the student's steps in which they lie are taken, instead of those drawn.
        """
        shape, device = batch["latents"].shape, batch["latents"].device
        noise = torch.randn(shape, generator=generator).to(device)
        times, sigmas = (part.to(device) for part in self._own)
        if time is None:
            step = losses.time_steps(len(noise), self.steps.student, generator).to(device)
        else:
            step = ((times >= time.to(device)[:, None]).sum(1) - 1).clamp(min=0)
        with_caption = (torch.rand(len(noise), generator=generator) >= self.dropout).float().to(device)
        given = conditions(batch, with_caption)
        with torch.no_grad():
            begin = self._reached(network, noise * sigmas[0], step, given)
            wanted = self._taken_by_teacher(begin, step, given)
        sigma, end = (sigmas[at].view(-1, 1, 1, 1) for at in (step, step + 1))
        found = begin + (end - sigma) * network(_scaled(begin, sigma), times[step], **given).sample.float()
        return {"output": (_scaled(found, end) - _scaled(wanted, end)).square().mean()}

    def _reached(
        self, network: torch.nn.Module, latents: torch.Tensor, step: torch.Tensor, given: Conditions
    ) -> torch.Tensor:
        """Where the student's own steps before ``step`` lead. Always as many forward passes, for a student that is
        sharded over several processes, whose steps differ."""
        times, sigmas = (part.to(latents.device) for part in self._own)
        for number in range(self.steps.student - 1):
            rows = torch.nonzero(step > number)[:, 0]
            some = rows if len(rows) else rows.new_zeros(1)
            before = latents[some]
            output = network(
                _scaled(before, sigmas[number]), times[number].expand(len(some)), **_picked(given, some)
            ).sample
            moved = before + (sigmas[number + 1] - sigmas[number]) * output.float()
            latents = latents.index_copy(0, rows, moved[: len(rows)])
        return latents

    def _taken_by_teacher(self, latents: torch.Tensor, step: torch.Tensor, given: Conditions) -> torch.Tensor:
        """Where the teacher's guided steps lead from the beginning of the student's ``step`` to its end."""
        each, dtype = self.steps.teacher, self.teacher.dtype
        times, sigmas = (part.to(latents.device) for part in self._teachers)
        both = cast(_with_empty(given), dtype)
        for place in range(each):
            at = step * each + place
            sigma, end = (sigmas[index].view(-1, 1, 1, 1) for index in (at, at + 1))
            seen = _scaled(latents, sigma).to(dtype)
            output = self.teacher(torch.cat([seen, seen]), times[at].repeat(2), **both).sample.float()
            prompted, empty = output.chunk(2)
            latents = latents + (end - sigma) * (empty + self.steps.guidance * (prompted - empty))
        return latents


def _scaled(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Latents with noise of this level as the U-Net takes them."""
    return latents / (sigma.square() + 1).sqrt()


def _picked(given: Conditions, rows: torch.Tensor) -> dict[str, Any]:
    return {name: _picked(value, rows) if isinstance(value, Mapping) else value[rows] for name, value in given.items()}


def _with_empty(given: Conditions) -> dict[str, Any]:
    """The same, followed by that of SDXL's empty prompt, zeros, at the same sizes."""
    added = given["added_cond_kwargs"]
    return {
        "encoder_hidden_states": _followed_by_zeros(given["encoder_hidden_states"]),
        "added_cond_kwargs": {
            "text_embeds": _followed_by_zeros(added["text_embeds"]),
            "time_ids": added["time_ids"].repeat(2, 1),
        },
    }


def _followed_by_zeros(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, torch.zeros_like(values)])
