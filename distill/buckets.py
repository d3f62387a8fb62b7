"""Aspect ratio buckets: the sizes to which images are cropped, and batches of one size each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Sampler

from .errors import UserError

LATENT = 8
"""Pixels per side of one latent cell."""

Size = tuple[int, int]
"""Width and height, pixels."""


def buckets(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Sizes of about ``resolution`` squared, from the tallest to the widest, sides in multiples of ``step``.

    A size is a bucket where neither side can grow by a step without exceeding that area; the square always is one.

    Raises UserError where the square has no room for one step, or ``step`` is not a multiple of ``LATENT``.
    """
    if step % LATENT:
        raise UserError(
            f"data.bucket_step = {step} is not a multiple of {LATENT}; expected one, as a latent cell is {LATENT} "
            f"pixels wide. Set it to {LATENT * math.ceil(step / LATENT)}."
        )
    if resolution < step:
        raise UserError(
            f"data.resolution = {resolution} is less than data.bucket_step = {step}; expected at least as "
            f"much. Raise the resolution or lower the step."
        )

    def longest(side: int) -> int:
        return resolution**2 // side // step * step

    square = resolution // step * step
    sides = range(step, math.floor(resolution * math.sqrt(max_aspect)) + step, step)
    largest = {(width, longest(width)) for width in sides if longest(width) and longest(longest(width)) == width}
    within = {size for size in largest if max(size) <= max_aspect * min(size)}
    return tuple(sorted(within | {(square, square)}, key=lambda size: (size[0] / size[1], size)))


def nearest(width: int, height: int, choices: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio differs by the smallest factor from that of an image."""
    return min(choices, key=lambda size: abs(math.log(width / height) - math.log(size[0] / size[1])))


def fit(
    image: Image.Image, bucket: Size, crop: Literal["center", "random"], generator: torch.Generator
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Scale an RGB image until it just covers the bucket, and crop it.

    Returns float32 [3, height, width] in [-1, 1], and SDXL's crop conditioning: the pixels cropped at the top and at
    the left, counted after scaling. ``generator`` is used for a random crop only.
    """
    width, height = bucket
    scale = max(width / image.width, height / image.height)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    spare = scaled[1] - height, scaled[0] - width
    if crop == "random":
        top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in spare)
    else:
        top, left = (room // 2 for room in spare)
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 127.5 - 1, (top, left)


class Turn(NamedTuple):
    """An image's turn in training."""

    place: int
    """Its index in the dataset."""
    epoch: int


@dataclass(frozen=True, eq=False)
class Batches(Sampler[list[Turn]]):
    """``count`` batches of a dataset's indices, from batch number ``start`` on; each is full and of one bucket.

    Batch i depends only on the seed, the data and i, so that a run can resume anywhere. An epoch contains every index;
    where a bucket's last batch is not full, the first indices of the bucket's epoch are repeated.
    """

    bucket_of: Sequence[int]
    """The bucket of each index; any integers. Not empty."""
    batch_size: int
    seed: int
    count: int
    start: int = 0
    drop_last: ClassVar[bool] = True
    """For accelerate, which would otherwise fill the last round of several processes from other buckets."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Turn]]:
        number, end = self.start, self.start + self.count
        while number < end:
            epoch, first = divmod(number, self.per_epoch)
            batches = self._epoch(epoch)[first : first + end - number]
            yield from ([Turn(place, epoch) for place in batch.tolist()] for batch in batches)
            number += len(batches)

    @cached_property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return sum(math.ceil(len(indices) / self.batch_size) for indices in self._indices)

    @cached_property
    def _indices(self) -> list[np.ndarray]:
        """The indices of each bucket."""
        which = np.asarray(self.bucket_of)
        return [np.flatnonzero(which == bucket) for bucket in np.unique(which)]

    def _epoch(self, epoch: int) -> np.ndarray:
        """An epoch's batches, int64 [batches, batch size]."""
        random = np.random.default_rng((self.seed % 2**64, epoch))
        batches_of_buckets = []
        for indices in self._indices:
            batches = math.ceil(len(indices) / self.batch_size)
            batches_of_buckets.append(
                np.resize(random.permutation(indices), (batches, self.batch_size))
            )  # repeats from the start
        return random.permutation(np.concatenate(batches_of_buckets))
