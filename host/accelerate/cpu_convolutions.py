"""3 x 3 convolutions in fp32 on the CPU, by other routines than PyTorch's choice where they are faster.

PyTorch has oneDNN compute them directly, for which it copies the weights into an order of its own every time.

- **Small images with many weights**, as in KOALA's deepest blocks: the copy takes longer than the convolution, and a
  matrix product is faster.
- **Large images**: Winograd's algorithm computes 6 x 6 pixels of a channel with 64 multiplications instead of 324
  (Andrew Lavin and Scott Gray, *Fast Algorithms for Convolutional Neural Networks*, arXiv 1509.09308). NNPACK has it,
  which PyTorch contains on Linux and macOS, but does not use where it has oneDNN.

Winograd's sums are rounded to the largest numbers of their 8 x 8 pixels, which the direct ones are not: next to a pixel
that is much larger than all others they would be coarse. Images with such pixels are convolved as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch.nn.functional import conv2d, pad

from .cpu_products import MIN_SPEEDUP, WIDE, are_plain, by_one_dnn, has_one_dnn, speedup

SMALL = 512
"""Output pixels of a batch up to which a convolution may be faster as a product, and beyond which by Winograd's
algorithm: the more pixels, the more a product copies, and the less it matters that Winograd's algorithm copies all
weights, to seven times their size."""
MIN_WEIGHTS = 9 * WIDE * WIDE // 2
"""Small convolutions with fewer weights than this have too small a copy to save."""
MIN_CHANNELS = 128
"""Convolutions with fewer channels, in or out, take little time; Winograd's algorithm is not measured with so few."""
MAX_PEAK = 64
"""An image's largest number over their root mean square, up to which Winograd's algorithm is used: at 100, numbers next
to it were wrong by 0.2 % of those of the image."""
MEASURED_CHANNELS = 640
"""Channels in and out with which Winograd's algorithm is measured: those of KOALA's middle blocks."""
MEASURED_SIDE = 64
"""Images are measured up to this side, and batches up to its square in pixels: with more, how the two compare hardly
changes."""
TILE, TRANSFORMED, BLOCK = 6, 4 * 8 * 8, 128
"""Of NNPACK: pixels of the side of a tile; bytes that it takes for each tile and channel out, and as many for each
channel in, of which it works on so many at a time."""
WORKSPACE = 384 * 2**20
"""Bytes that NNPACK may take. It keeps them for its next call, until the thread ends."""
HALO = 2
"""The row above and the row below that a part of an image needs besides its own."""


class Convolution(NamedTuple):
    """A 3 x 3 convolution with one pixel of zeros around its image.

    ``x`` [batch, channels in, height, width], ``weight`` [channels out, channels in, 3, 3], ``bias`` [channels out],
    all in fp32; ``stride`` 1 or 2.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: int = 1

    @classmethod
    def of(
        cls, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *settings: Any
    ) -> Convolution | None:
        """The one that a call of ``conv2d`` computes, if it is such a one."""
        if len(settings) != 4 or weight.shape[2:] != (3, 3) or x.dim() != 4 or not are_plain(x, weight):
            return None
        if bias is not None and (bias.dtype is not torch.float32 or bias.shape != weight.shape[:1]):
            return None
        stride, padding, dilation, groups = settings
        is_usual = stride in ((1, 1), (2, 2)) and padding == dilation == (1, 1) and groups == 1
        return cls(x, weight, bias, stride[0]) if is_usual else None

    def faster_way(self) -> Callable[[], torch.Tensor] | None:
        """What computes it faster than PyTorch's choice; None where nothing does."""
        batch, channels, *sides = self.x.shape
        height, width = (ceil(side / self.stride) for side in sides)
        if batch * height * width <= SMALL:
            is_heavy = self.weight.numel() >= MIN_WEIGHTS
            return self.as_product if is_heavy and product_is_faster(batch, height, width) else None
        may_be = self.stride == 1 and min(channels, len(self.weight)) >= MIN_CHANNELS
        return self.by_winograd if may_be and winograd_is_faster(batch, height, width) and self._is_even() else None

    def usual(self) -> torch.Tensor:
        """[batch, channels out, height, width], by PyTorch's choice."""
        return conv2d(self.x, self.weight, self.bias, self.stride, 1)

    def as_product(self) -> torch.Tensor:
        """[batch, channels out, height, width]: each output pixel's neighbourhood is a row, the weights are as they
        lie in memory, without a copy."""
        around = pad(self.x, (1, 1, 1, 1)).unfold(2, 3, self.stride).unfold(3, 3, self.stride)
        batch, _, height, width = around.shape[:4]
        rows = around.permute(0, 2, 3, 1, 4, 5).reshape(batch * height * width, -1)
        made = by_one_dnn(rows, self.weight.flatten(1), self.bias)
        return made.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()

    def by_winograd(self) -> torch.Tensor:
        """[batch, channels out, height, width], with ``nnpack()``, which has to be there. It transforms the weights at
        every call, so each gets several images, one above the other, or as much of one as there is room for."""
        convolve = nnpack()
        assert convolve is not None
        batch, channels, height, width = self.x.shape
        rows = _rows(width, channels, len(self.weight))
        if batch == 1 and height <= rows:
            return convolve(self.x, self.weight, self.bias, 1)
        made = self.x.new_empty(batch, len(self.weight), height, width)
        zeros = self.x.new_zeros(1, channels, 1, width)
        for strip in _together(batch, height, rows) if height <= rows else _bands(batch, height, rows):
            stacked = torch.cat([own for part in strip for own in part.with_halo(self.x, zeros)], dim=2)
            convolved = convolve(stacked, self.weight, self.bias, (0, 1))  # no rows are added: they are there
            top = 0
            for part in strip:
                made[part.image, :, part.top : part.end] = convolved[0, :, top : top + part.height]
                top += part.height + HALO
        return made

    def _is_even(self) -> bool:
        """Whether no number is so much larger than the others that Winograd's algorithm would lose them. Of the others
        a part is looked at."""
        least, most = torch.aminmax(self.x)
        some = self.x[:, :, :: max(1, self.x.shape[2] // 8)]
        return bool(torch.maximum(-least, most) <= MAX_PEAK * some.square().mean().sqrt())


class _Part(NamedTuple):
    """Rows of an image of a batch, from ``top`` to before ``end``."""

    image: int
    top: int
    end: int

    @property
    def height(self) -> int:
        return self.end - self.top

    def with_halo(self, x: torch.Tensor, zeros: torch.Tensor) -> list[torch.Tensor]:
        """[1, channels, rows, width] each: with the row above and the one below, ``zeros`` at the image's edges."""
        above = [zeros] if self.top == 0 else []
        below = [zeros] if self.end == x.shape[2] else []
        return [*above, x[self.image : self.image + 1, :, max(0, self.top - 1) : self.end + 1], *below]


def product_is_faster(batch: int, height: int, width: int) -> bool:
    """Whether a convolution of KOALA's deepest blocks, with an output of that size, is faster as a product; measured
    once for each size, in some 100 to 500 ms."""
    return has_one_dnn() and _is_faster(Convolution.as_product, WIDE, (batch, height, width), torch.get_num_threads())


def winograd_is_faster(batch: int, height: int, width: int) -> bool:
    """Whether a convolution of images of that size is faster by Winograd's algorithm; measured once for each size, in
    some 100 ms to a second."""
    height, width = min(height, MEASURED_SIDE), min(width, MEASURED_SIDE)
    size = (min(batch, MEASURED_SIDE**2 // (height * width)), height, width)
    # NNPACK keeps the number of threads that it began with
    return nnpack() is not None and _is_faster(
        Convolution.by_winograd, MEASURED_CHANNELS, size, torch.get_num_threads()
    )


def winograd_is_faster_for_large_images() -> bool:
    """The same for all images from ``MEASURED_SIDE`` on, a VAE's for example."""
    return winograd_is_faster(1, MEASURED_SIDE, MEASURED_SIDE)


@cache
def _is_faster(
    way: Callable[[Convolution], torch.Tensor], channels: int, size: tuple[int, int, int], threads: int
) -> bool:
    batch, *sides = size
    measured = Convolution(torch.ones(batch, channels, *sides), torch.ones(channels, channels, 3, 3), None)
    return speedup(measured.usual, lambda: way(measured), times=2) >= MIN_SPEEDUP


@cache
def nnpack() -> Callable[..., torch.Tensor] | None:
    """NNPACK's convolution, if this PyTorch and this processor have it."""
    # It has no public name, and works only after PyTorch was asked for NNPACK, which sets it up.
    convolve: Callable[..., torch.Tensor] | None = getattr(torch, "_nnpack_spatial_convolution", None)
    return convolve if torch.backends.nnpack.is_available() else None


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
