"""Early word on divergence: a value that is not finite ends the training, a loss far above its level is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from . import checkpoints
from .errors import UserError

NEVER = 2**31 - 1
ROWS = 20
"""Rows of metrics over which the level is averaged, and before which nothing is told."""
FACTOR, SPREADS = 2.0, 6.0
"""Far above: more than so many times the level, and so many standard deviations of the rows above it."""


class Finite:
    """Remembers the first step at which each value was infinite or NaN, where the values are computed.

    Nothing is fetched from a GPU until ``require`` does, which has to be before a checkpoint: until then the weights
    may already be worthless, but no file is.
    """

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def see(self, values: Mapping[str, torch.Tensor], step: int) -> None:
        """Note the scalars of optimiser step ``step``."""
        for name, value in values.items():
            never = torch.full((), NEVER, dtype=torch.int32, device=value.device)
            now = torch.where(value.detach().isfinite(), never, step)
            self.first[name] = torch.minimum(self.first.get(name, never), now)

    def require(self, accelerator: Accelerator, saves: Path) -> None:
        """Raises UserError, on every process alike, with the first step and value that is not finite."""
        steps = accelerator.gather(torch.stack(list(self.first.values()))).view(-1, len(self.first)).amin(0).tolist()
        step, order = min((step, order) for order, step in enumerate(steps))
        if step == NEVER:
            return
        earlier = checkpoints.existing(saves)
        state = f"the last good state is {earlier[-1]}" if earlier else "there is no checkpoint yet"
        raise UserError(
            f"step {step}: the {list(self.first)[order]} is not finite; training has stopped and {state}. Lower "
            f'training.learning_rate, or set precision = "no" or a teacher dtype with more range, and run again: the '
            f"run resumes from there."
        )


class Level:
    """The running level of the loss: mean and variance over the last rows of metrics, saved with each checkpoint."""

    def __init__(self) -> None:
        self.rows, self.mean, self.variance, self.lowest, self.told = 0, 0.0, 0.0, math.inf, False

    def see(self, loss: float) -> float | None:
        """Take in a row's loss; the level until now where it is told, once a run, that the loss is far above it.

        That is a jump above the mean, or a mean that has risen far above the lowest it has ever been.
        """
        before, spread = self.mean, math.sqrt(self.variance)
        jumped = loss > FACTOR * before and loss > before + SPREADS * spread
        share = 1 / min(self.rows + 1, ROWS)
        self.variance = (1 - share) * (self.variance + share * (loss - before) ** 2)
        self.mean = before + share * (loss - before)
        self.rows += 1
        if self.rows <= ROWS:
            return None
        self.lowest = min(self.lowest, before)
        if self.told or not (jumped or self.mean > FACTOR * self.lowest):
            return None
        self.told = True
        return before if jumped else self.lowest
