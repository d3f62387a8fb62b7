"""The loss on images that the student does not learn from, by noise level."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import default_collate

from . import losses, texts
from .cache import Cache
from .config import Config
from .objective import Objective

LEVELS = (125, 375, 625, 875)
"""Time steps of SDXL's 1000, from little noise to much: the middle of each quarter."""


def split(config: Config, samples: Cache) -> tuple[list[int], list[int]]:
    """The samples to learn from and those held out, ``validation.images`` drawn by the seed; both ascending.

    At most half of the samples are held out.
    """
    count = min(config.validation.images, len(samples) // 2)
    drawn = np.random.default_rng(config.training.seed).permutation(len(samples))
    return sorted(drawn[count:].tolist()), sorted(drawn[:count].tolist())


@dataclass(frozen=True)
class Validation:
    """Measures the held-out loss: that of training, without dropped captions, with each image's first one and the same
    noise each time."""

    objective: Objective
    samples: Cache
    held_out: list[int]
    batch: int
    seed: int
    with_texts: Callable[[texts.Batch], texts.Batch] = texts.unchanged
    """What gives a batch its embeddings."""

    @torch.no_grad()
    def losses(self, network: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The mean loss, and that of each noise level, over all processes; called on every process.

        Args:
            network: the student, as it is trained.
            accelerator: that of the run.
        """
        objective = dataclasses.replace(self.objective, dropout=0.0)
        sums, images = torch.zeros(len(LEVELS), device=accelerator.device), 0
        batches = list(self._batches())
        for place in range(
            accelerator.process_index, _rounded_up(len(batches), accelerator), accelerator.num_processes
        ):
            indices = batches[place % len(batches)]  # a sharded student needs every process in each forward pass
            counts = len(indices) if place < len(batches) else 0
            samples = [self.samples[index] for index in indices]
            given = self.with_texts(
                {key: value.to(accelerator.device) for key, value in default_collate(samples).items()}
            )
            for at, level in enumerate(LEVELS):
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) * 4096 + level)
                time = torch.full((len(indices),), level)
                errors = objective.errors(network, given, generator, time)
                sums[at] += counts * losses.total(objective.table, errors)
            images += counts
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the backward pass would do it
        total = accelerator.reduce(torch.cat([sums, sums.new_tensor([images])]), "sum")
        means = (total[:-1] / total[-1]).tolist()
        return {
            "loss": sum(means) / len(means),
            **{f"loss at {level}": mean for level, mean in zip(LEVELS, means, strict=True)},
        }

    def _batches(self) -> Iterator[list[int]]:
        """The held-out samples, up to ``batch`` of one bucket at a time."""
        bucket_of = self.samples.bucket_of
        for bucket in sorted({bucket_of[index] for index in self.held_out}):
            own = [index for index in self.held_out if bucket_of[index] == bucket]
            yield from (own[first : first + self.batch] for first in range(0, len(own), self.batch))


def _rounded_up(count: int, accelerator: Accelerator) -> int:
    return -(-count // accelerator.num_processes) * accelerator.num_processes
