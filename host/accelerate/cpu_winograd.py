"""3 x 3 convolutions in fp32 on the CPU by Winograd's algorithm (arXiv 1509.09308), as NNPACK has it, which PyTorch
contains on Linux and macOS.

NNPACK transforms the weights at every call and keeps the memory that it took. So it gets several images at a time, one
above the other, or as much of one as there is room for. Where rows are copied for that anyway, what comes before the
convolution and what is added to it are computed on the way: large images take longer to be written to new memory than
to be activated.

Sums are rounded to the largest numbers of their 8 x 8 pixels: next to a pixel that is much larger than all others they
would be coarse. What has such pixels is convolved as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import ceil, prod
from typing import NamedTuple

import torch
from torch.nn.functional import conv2d, silu

MAX_PEAK = 64
"""The largest number over the root mean square, up to which the algorithm is used: at 100, numbers next to it were
wrong by 0.2 % of those of the image."""
MAX_OFFSET = 64
"""A group's mean over its standard deviation, up to which its variance is computed as a difference of sums."""
TILE, TRANSFORMED, BLOCK = 6, 4 * 8 * 8, 128
"""Of NNPACK: pixels of the side of a tile; bytes that it takes for each tile and channel out, and as many for each
channel in, of which it works on so many at a time."""
WORKSPACE = 384 * 2**20
"""Bytes that NNPACK may take. It keeps them for its next call, until the thread ends."""
HALO = 2
"""The row above and the row below that a part of an image needs besides its own."""


@cache
def nnpack() -> Callable[..., torch.Tensor] | None:
    """NNPACK's convolution, if this PyTorch and this processor have it."""
    # It has no public name, and works only after PyTorch was asked for NNPACK, which sets it up.
    convolve: Callable[..., torch.Tensor] | None = getattr(torch, "_nnpack_spatial_convolution", None)
    return convolve if torch.backends.nnpack.is_available() else None


class Memory:
    """Memory that a network's layers use one after the other, instead of asking the system for new one each time."""

    def __init__(self) -> None:
        self._parts: dict[str, torch.Tensor] = {}

    def take(self, purpose: str, *shape: int) -> torch.Tensor:
        """A tensor in fp32, of which nothing is kept when the next is taken for the same purpose."""
        found, size = self._parts.get(purpose), prod(shape)
        if found is None or len(found) < size:
            self._parts.pop(purpose, None)
            found = self._parts[purpose] = torch.empty(size)
        return found[:size].view(shape)


class Activation(NamedTuple):
    """A group norm and SiLU before a convolution, not computed yet. ``scale``, ``shift``: [batch, channels, 1, 1]."""

    scale: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, norm: torch.nn.GroupNorm, x: torch.Tensor) -> Activation | None:
        """That of an image, [batch, channels, height, width]; None where its numbers lie so far from zero that sums in
        fp32 do not tell their variance."""
        batch, channels, height, width = x.shape
        of_a_group = channels // norm.num_groups
        # Sums of rows: exact enough, and a tenth of the time that PyTorch takes for variances.
        rows, squares = x.mean(3).double(), torch.linalg.vector_norm(x, dim=3).double().square() / width
        mean, square = (one.view(batch, norm.num_groups, of_a_group * height).mean(2) for one in (rows, squares))
        variance = square - mean.square()
        if not bool((mean.square() <= MAX_OFFSET**2 * variance).all()):
            return None
        scale = (variance + norm.eps).rsqrt().repeat_interleave(of_a_group, 1) * norm.weight
        shift = norm.bias - mean.repeat_interleave(of_a_group, 1) * scale
        return cls(*(one.float().view(batch, channels, 1, 1) for one in (scale, shift)))

    def into(self, made: torch.Tensor, x: torch.Tensor, image: int | slice = slice(None)) -> torch.Tensor:
        """Write the activation of ``x``, rows of an image or of all, to ``made``; returns that."""
        return silu(torch.addcmul(self.shift[image], x, self.scale[image], out=made), inplace=True)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: Activation | None = None,
    added: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    memory: Memory | None = None,
) -> torch.Tensor:
    """A convolution with one pixel of zeros around its image, with ``nnpack()``, which has to be there.

    Args:
        x: [batch, channels in, height, width], fp32.
        weight: [channels out, channels in, 3, 3].
        bias: [channels out].
        activation: what becomes of ``x`` before.
        added: to the result.
        out: where the result may be; ``added`` itself, for example, or some of ``memory``.
        memory: for what is passing.

    Returns: [batch, channels out, height, width].
    """
    batch, channels, height, width = x.shape
    memory = memory or Memory()
    rows = _rows(width, channels, len(weight))
    if batch == 1 and height <= rows:
        taken = x if activation is None else activation.into(memory.take("taken", *x.shape), x)
        made = _convolved(taken, weight, bias, 1)
        return made if added is None else made.add_(added)
    made = x.new_empty(batch, len(weight), height, width) if out is None else out
    for strip in _together(batch, height, rows) if height <= rows else _bands(batch, height, rows):
        stacked = memory.take("taken", 1, channels, sum(part.height + HALO for part in strip), width)
        tops = [sum(part.height + HALO for part in strip[:place]) for place in range(len(strip))]
        for part, top in zip(strip, tops, strict=True):
            part.take(x, activation, stacked[0, :, top : top + part.height + HALO])
        convolved = _convolved(stacked, weight, bias, (0, 1))  # no rows are added: they are there
        for part, top in zip(strip, tops, strict=True):
            part.give(convolved[0, :, top : top + part.height], added, made)
    return made


def _convolved(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int | tuple[int, int]
) -> torch.Tensor:
    way = nnpack() if _is_even(x) else None
    return conv2d(x, weight, bias, 1, padding) if way is None else way(x, weight, bias, padding)


def _is_even(x: torch.Tensor) -> bool:
    """Whether no number is so much larger than the others that they would be lost. A part of the others is looked
    at."""
    least, most = torch.aminmax(x)
    some = x[:, :, :: max(1, x.shape[2] // 8)]
    return bool(torch.maximum(-least, most) <= MAX_PEAK * some.square().mean().sqrt())


class _Part(NamedTuple):
    """Rows of an image of a batch, from ``top`` to before ``end``."""

    image: int
    top: int
    end: int

    @property
    def height(self) -> int:
        return self.end - self.top

    def take(self, x: torch.Tensor, activation: Activation | None, into: torch.Tensor) -> None:
        """Copy them, activated, with the row above and the one below, zeros at the image's edges."""
        above, below = int(self.top > 0), int(self.end < x.shape[2])
        rows = x[self.image, :, self.top - above : self.end + below]
        own = into[:, 1 - above : 1 + self.height + below]
        if activation is None:
            own.copy_(rows)
        else:
            activation.into(own, rows, self.image)
        if not above:
            into[:, 0].zero_()
        if not below:
            into[:, -1].zero_()

    def give(self, convolved: torch.Tensor, added: torch.Tensor | None, made: torch.Tensor) -> None:
        """Put them where they belong."""
        place = (self.image, slice(None), slice(self.top, self.end))
        if added is None:
            made[place].copy_(convolved)
        else:
            torch.add(convolved, added[place], out=made[place])


def _rows(width: int, channels_in: int, channels_out: int) -> int:
    """Rows of an image, whole tiles, for which NNPACK's memory is enough."""
    of_a_row = ceil(width / TILE) * TRANSFORMED * (channels_out + min(channels_in, BLOCK))
    return TILE * max(1, WORKSPACE // of_a_row)


def _together(batch: int, height: int, rows: int) -> Iterator[list[_Part]]:
    """A batch's images, as many at a time as have so many rows at most, with a halo between them."""
    images = [_Part(image, 0, height) for image in range(batch)]
    count = max(1, (rows + HALO) // (height + HALO))
    return (images[first : first + count] for first in range(0, batch, count))


def _bands(batch: int, height: int, rows: int) -> Iterator[list[_Part]]:
    """A batch's images, one after the other, in as few bands of whole tiles as have so many rows at most, each of the
    same height but for the last."""
    tiles = ceil(height / TILE)
    bands = ceil(TILE * tiles / rows)
    band = TILE * ceil(tiles / bands)
    for image in range(batch):
        yield from ([_Part(image, top, min(height, top + band))] for top in range(0, height, band))
