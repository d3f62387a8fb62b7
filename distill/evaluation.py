"""What is looked at while training: held-out loss, sample images and their measures; and which step is the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from . import checkpoints, measures, processes, trackers
from .average import Average
from .config import Config
from .errors import UserError
from .measures import Measures
from .metrics import CsvTracker
from .samples import Grid
from .validation import Validation

Watch = Callable[[int, UNet2DConditionModel], None]
Row = dict[str, float]
VALIDATED = "validation.csv"
"""What was measured, in the output folder."""


class Due(NamedTuple):
    """What is due after an optimiser step; everything that was switched on is due after the last one."""

    row: bool
    validation: bool
    checkpoint: bool
    samples: bool

    @classmethod
    def at(cls, config: Config, step: int) -> Due:
        """What is due after ``step`` steps."""
        validation, log = config.validation, config.log
        intervals = (
            log.every,
            validation.every if validation.images or measures.wanted(config) else 0,
            config.training.checkpoint_every,
            log.samples_every,
        )
        last = step == config.training.steps
        return cls(*(every > 0 and (last or step % every == 0) for every in intervals))


@dataclass
class Evaluation:
    """Looks at the averaged student where something is due."""

    config: Config
    validation: Validation | None
    """On every process, the others on the main one alone."""
    grid: Grid | None
    measures: Measures | None
    watch: Watch | None
    say: Callable[[str], None]
    drawn: tuple[int, torch.Tensor] | None = None
    """The step and the images that were last drawn."""

    @classmethod
    def of(
        cls,
        config: Config,
        validation: Validation | None,
        grid: Grid | None,
        watch: Watch | None,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> Evaluation:
        """Raises UserError where CLIP cannot be loaded; called on every process."""
        found = processes.on_every(
            accelerator,
            lambda: Measures.of(config, accelerator.device) if grid and measures.wanted(config) else None,
        )
        return cls(config, validation, grid, found, watch if accelerator.is_main_process else None, say)

    def measured(
        self,
        step: int,
        network: torch.nn.Module,
        average: Average | None,
        unet: UNet2DConditionModel | None,
        accelerator: Accelerator,
    ) -> checkpoints.Best | None:
        """Measure and log; this step as the best one, if it is. Called on every process.

        Args:
            step: the optimiser steps done.
            network: the student as it is trained.
            average: its averaged weights, with which it is measured.
            unet: the averaged student, on the main process, if sample images are to be measured.
            accelerator: that of the run.
        """
        row: Row = {}
        if self.validation:
            with average.in_place() if average else nullcontext():
                row = self.validation.losses(network, accelerator)
        if unet and self.grid and self.measures:
            folder, images = self.grid.write(step, self._images(step, unet))
            try:
                row |= self.measures(folder, images, self.config.log.prompts)
            except UserError as error:
                self.say(f"step {step}: {error} Training goes on without it.")
        return processes.on_main(accelerator, lambda: self._recorded(step, row, accelerator))

    def shown(self, step: int, unet: UNet2DConditionModel) -> None:
        """Draw the grid of sample images; on the main process."""
        if self.grid:
            self.grid.save(step, self._images(step, unet))
        if self.watch:
            self.watch(step, unet)

    def _images(self, step: int, unet: UNet2DConditionModel) -> torch.Tensor:
        assert self.grid is not None
        if self.drawn is None or self.drawn[0] != step:
            self.drawn = step, self.grid.draw(unet)
        return self.drawn[1]

    def _recorded(self, step: int, row: Row, accelerator: Accelerator) -> checkpoints.Best | None:
        CsvTracker(self.config.output / VALIDATED).log(row, step=step)
        trackers.log_measures(accelerator, row, step)
        wanted = self.config.validation.best
        direction, _, name = wanted.partition(" ")
        if name not in row:
            self.say(f"step {step}: validation.best = {wanted!r}, but measured was {', '.join(row) or 'nothing'}.")
            return None
        before, sign = checkpoints.best(self.config.output / "checkpoints"), -1 if direction == "lowest" else 1
        is_better = before is None or before.measure != wanted or sign * row[name] > sign * before.value
        if not is_better or not math.isfinite(row[name]):
            return None
        return checkpoints.Best(step=step, measure=wanted, value=row[name])
