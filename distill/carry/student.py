"""The KOALA with a LoRA or ControlNet whose numbers can be set: its outputs, and how they change with those numbers.

PEFT puts a LoRA's factors beside the layers, so that no weight of the KOALA is copied. Changes of norms and biases,
which have no factors, are added to the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from .. import losses
from ..config import LossTable
from .fit import Changes, low_rank
from .samples import Acts, Samples, Texts, alone, output
from .settings import Settings

UP, DOWN = " up", " down"
"""What follows a weight's name in the names of its two factors: [out, rank] and [rank, in]."""
FAINT = 1e-2
"""A direction of a factor is taken to be unused below this share of the strongest."""


def factors(changes: Iterable[tuple[str, Tensor]], rank: int) -> Changes:
    """Changes of weights as products of two factors, of a rank at most; of norms and biases as they are.

    Where a change has a lower rank, the further rows of ``DOWN`` are directions that have no effect yet, as ``UP`` is
    zero there, and can get one.
    """
    found: Changes = {}
    for name, change in changes:
        if change.ndim == 1:
            found[name] = change
            continue
        matrix = change.flatten(1)
        up, down = low_rank(matrix, min(rank, *matrix.shape))
        lengths = down.norm(dim=1)
        used = lengths > FAINT * lengths.max().clamp(min=1e-12)
        usual = lengths[used].mean() if used.any() else torch.tensor(1.0)
        free = torch.randn(down.shape, generator=torch.Generator().manual_seed(len(found))) / down.shape[1] ** 0.5
        found[name + UP] = torch.where(used, up, 0.0)
        found[name + DOWN] = torch.where(used[:, None], down, usual * free)
    return found


@dataclass(frozen=True)
class Learner:
    """Where the numbers that are learned have their place in a KOALA."""

    start: Changes
    """The numbers to begin with."""
    parameters: Mapping[str, nn.Parameter]
    """What holds each of them."""
    base: Changes = field(default_factory=dict)
    """Of parameters of the KOALA itself, to which a number is added: their own values."""
    acts: Acts = alone


def factors_beside(unet: UNet2DConditionModel, start: Changes) -> Learner:
    """Places for the factors of a LoRA in a U-Net; ``start`` says where, and of which rank."""
    plain = {name: unet.get_parameter(name) for name in start if not name.endswith((UP, DOWN))}
    ranks = {name.removesuffix(f".weight{UP}"): up.shape[1] for name, up in start.items() if name.endswith(UP)}
    if ranks:
        unet.add_adapter(LoraConfig(target_modules=list(ranks), rank_pattern=dict(ranks), alpha_pattern=dict(ranks)))
    base = {name: parameter.detach().clone() for name, parameter in plain.items()}
    for parameter in plain.values():
        parameter.data = parameter.data.clone()  # it may be the file itself, mapped into memory
    parameters: dict[str, nn.Parameter] = dict(plain)
    for module in ranks:
        layer = unet.get_submodule(module)
        parameters[f"{module}.weight{UP}"] = layer.lora_B["default"].weight
        parameters[f"{module}.weight{DOWN}"] = layer.lora_A["default"].weight
    return Learner(start, parameters, base)


class Student:
    """A KOALA's U-Net with the places of the numbers."""

    def __init__(
        self, unet: UNet2DConditionModel, learner: Learner, texts: Texts, noise: DDPMScheduler, given: Settings
    ) -> None:
        self.unet, self.learner, self.texts, self.given = unet, learner, texts, given
        self.parameters = learner.parameters
        unet.requires_grad_(False)
        unet.enable_gradient_checkpointing()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.weights = losses.time_weights(
            LossTable(weighting="velocity"), noise, torch.arange(noise.config.num_train_timesteps)
        ).sqrt()

    @torch.no_grad()
    def set(self, changes: Changes) -> None:
        """Give the LoRA or ControlNet its numbers."""
        base = self.learner.base
        for name, parameter in self.parameters.items():
            value = changes[name].to(parameter.device).reshape(parameter.shape)
            parameter.copy_(base[name] + value if name in base else value)

    @torch.no_grad()
    def outputs(self, changes: Changes, samples: Samples) -> Tensor:
        """The outputs with these numbers, times the square root of their weight in velocity's error; fp32, CPU."""
        self.set(changes)
        return torch.cat([self._weighted(samples.pick(part)).cpu() for part in self._parts(samples)])

    def slopes(self, changes: Changes, samples: Samples, error: Callable[[Tensor, Tensor], Tensor]) -> Changes:
        """The transposed Jacobian of ``outputs`` times an error, one batch after the other.

        Args:
            changes: the numbers.
            samples: those that the outputs are of.
            error: function of the outputs of some samples, and of their numbers: as many as outputs.
        """
        self.set(changes)
        total = {name: torch.zeros_like(change) for name, change in changes.items()}
        for part in self._parts(samples):
            with torch.enable_grad():
                found = self._weighted(samples.pick(part))
                scaled = (found * error(found.detach().cpu(), part).to(found.device)).sum()
                slopes = torch.autograd.grad(scaled, list(self.parameters.values()))
            for name, slope in zip(self.parameters, slopes, strict=True):
                total[name] += slope.cpu().reshape(total[name].shape)
        return total

    def _weighted(self, samples: Samples) -> Tensor:
        found = output(self.unet, samples, self.texts.with_lora, self.given, self.learner.acts)
        return found * self.weights[samples.time].to(found.device).view(-1, 1, 1, 1)

    def _parts(self, samples: Samples) -> tuple[Tensor, ...]:
        return torch.arange(len(samples.time)).split(self.given.batch)
