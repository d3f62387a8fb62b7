"""What a run is going to do, in words: places, forward passes, memory; from the files' headers alone."""

from __future__ import annotations

import torch

from ...koala.architecture.keys import Shape, parameters, tensors
from ...koala.architecture.layout import name
from ...koala.files.dtypes import TORCH_DTYPES
from ...koala.lora.learning import ITERATIONS, ROUNDS
from .settings import PER_PROMPT, SAMPLING_STEPS, Settings
from .source import Source

SLOPES = 4
"""Passes for the slopes of one image: there, there again as its activations are not kept, and back."""
OUTPUTS = 3
"""Passes of a round of least squares beside its iterations: without a LoRA, before, and after."""
COPIES = 8
"""Of the new LoRA's numbers in memory, fp32: themselves, slopes, and the directions and moments of either method."""

KEPT_COPIES = ROUNDS + 1 + 2 * 3
"""Of these on the disk: after each round and at the end, and with both moments in a checkpoint that is replaced."""


def plan(given: Settings, source: Source, device: torch.device) -> list[str]:
    """The lines that a run begins with."""
    rank, samples = source.rank(given), given.samples + given.held_out
    numbers = sum(_numbers(shape, rank) for shape in _shapes(source))
    prompts = -(-given.samples // PER_PROMPT) + -(-given.held_out // PER_PROMPT)
    passes = ROUNDS * (OUTPUTS + (1 + SLOPES) * ITERATIONS) * given.samples
    passes += SLOPES * given.steps * given.batch if given.method == "refit" else 0
    whole = parameters(source.teacher.layout) * TORCH_DTYPES[given.dtype].itemsize
    part = 4 * (parameters(source.student.layout) + COPIES * numbers)
    disk = 4 * (2 * samples * 4 * (given.size // 8) ** 2 + KEPT_COPIES * numbers)
    return [
        source.change.report(),
        f"new LoRA: rank {rank}, {numbers / 1e6:.1f} million numbers, {2 * numbers / 1e6:.0f} MB",
        f"SDXL, in {given.dtype}, on {device.type}: {2 * prompts * SAMPLING_STEPS + 2 * samples} forward passes of one "
        f"image at {given.size} px; {_gigabytes(whole)} and the activations of {2 * given.batch} images",
        f"{name(source.student.layout)}, in fp32: {2 * prompts * SAMPLING_STEPS + passes} such passes, one of them for "
        f"each forward pass and two for a backward one; {_gigabytes(part)} and the activations of {given.batch} images",
        f"disk, until it is finished: {_gigabytes(disk)} in {given.work}",
    ]


def _shapes(source: Source) -> list[Shape]:
    """The shapes of the weights that the LoRA changes in the KOALA."""
    places, every = source.change.places, tensors(source.student.layout)
    return [tensor.shape for tensor in every if tensor.comfy.removesuffix(".weight") in places]


def _numbers(shape: Shape, rank: int) -> int:
    """Of a weight's factors; a norm's are its own."""
    if len(shape) == 1:
        return shape[0]
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return min(rank, rows, columns) * (rows + columns)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
