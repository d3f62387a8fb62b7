"""What a run is going to do, in words: places, forward passes, memory; from the files' headers alone."""

from __future__ import annotations

import torch

from ...koala.architecture.keys import parameters
from ...koala.architecture.layout import name
from ...koala.files.dtypes import TORCH_DTYPES
from ...koala.lora.learning import ITERATIONS, ROUNDS
from .settings import FITTED, PER_STEP, Settings
from .source import Source

SLOPES = 4
"""Passes for the slopes of one image: there, there again as its activations are not kept, and back."""
OUTPUTS = 2
"""Passes of a round of least squares beside its iterations: before, and after."""
SHARES = 2
"""How often the held-out samples are computed, beside once after each round: before these, and at the end."""
COPIES = 8
"""Of the learned numbers in memory, fp32: themselves, slopes, and the directions and moments of either method."""

KEPT_COPIES = ROUNDS + 1 + 2 * 3
"""Of these on the disk: after each round and at the end, and with both moments in a checkpoint that is replaced."""


def plan(given: Settings, source: Source, device: torch.device) -> list[str]:
    """The lines that a run begins with."""
    change, samples = source.change, given.samples + given.held_out
    numbers = change.count(given)
    drawings = sum(-(-count // given.per_prompt) for count in (given.samples, given.held_out))
    drawing = drawings * given.draw_steps * (2 if given.guided else 1)
    passes = ROUNDS * (OUTPUTS + (1 + SLOPES) * ITERATIONS) * min(given.samples, FITTED)
    passes += samples + (ROUNDS + SHARES) * given.held_out
    passes += SLOPES * given.steps * PER_STEP if given.method == "refit" else 0
    whole = parameters(source.teacher.layout) * TORCH_DTYPES[given.dtype].itemsize + change.bytes
    part = change.bytes + 4 * (parameters(source.student.layout) + COPIES * numbers)
    disk = 4 * (2 * samples * 4 * (given.size // 8) ** 2 + KEPT_COPIES * numbers)
    return [
        change.report(),
        f"new {change.kind}: {change.result(given)}, {numbers / 1e6:.1f} million numbers, {2 * numbers / 1e6:.0f} MB",
        f"samples: {samples}, from {drawings} images that each network draws in {given.draw_steps} steps, cfg "
        f"{given.cfg:g}, {given.spacing}",
        f"SDXL, in {given.dtype}, on {device.type}: {drawing + 2 * samples} forward passes of one "
        f"image at {given.size} px; {_gigabytes(whole)} and the activations of {2 * given.batch} images",
        f"{name(source.student.layout)}, in fp32: at most {drawing + passes} such passes, one for "
        f"each forward pass and two for a backward one; {_gigabytes(part)} and the activations of {given.batch} images",
        f"disk, until it is finished: {_gigabytes(disk)} in {given.work}",
    ]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
