"""3 x 3 convolutions in fp32 on the CPU, by other routines than PyTorch's choice where they are faster.

PyTorch has oneDNN compute them directly, for which it copies the weights into an order of its own every time.

- **Small images with many weights**, as in KOALA's deepest blocks: the copy takes longer than the convolution, and a
  matrix product is faster.
- **Large images**: Winograd's algorithm computes 6 x 6 pixels of a channel with 64 multiplications instead of 324
  (Andrew Lavin and Scott Gray, *Fast Algorithms for Convolutional Neural Networks*, arXiv 1509.09308). NNPACK has it,
  which PyTorch contains on most systems, but uses only in place of oneDNN. Its sums differ from the direct ones by some
  three millionths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import conv2d, pad

from .cpu_products import MIN_SPEEDUP, WIDE, are_plain, by_one_dnn, has_one_dnn, speedup

SMALL = 512
"""Output pixels, over a batch, up to which a convolution may be faster as a product: with more, the copy of the weights
matters less, and the one of the image more. With more, it may be faster by Winograd's algorithm, which copies the
weights to seven times their size."""
MIN_WEIGHTS = 9 * WIDE * WIDE // 2
"""Small convolutions with fewer weights than this have too small a copy to save."""
MIN_CHANNELS = 128
"""Convolutions with fewer channels, in or out, have too few multiplications for Winograd's algorithm to save."""
MEASURED_CHANNELS = 640
"""Channels in and out with which Winograd's algorithm is measured: those of KOALA's middle blocks."""
MEASURED_SIDE = 64
"""An image of so many pixels a side is the largest that is measured, and so many pixels in all the most: with more, how
the two compare hardly changes."""
TILE, TRANSFORMED = 6, 4 * 8 * 8
"""Pixels of the side of one of NNPACK's tiles; bytes that it takes of each while it computes, for every channel."""
WORKSPACE = 256 * 2**20
"""Bytes that NNPACK takes at most, as it keeps them while the thread lives. Larger images are computed in bands."""
HALO = 2
"""Rows that a part of an image needs above and below it, together."""


class Convolution(NamedTuple):
    """A 3 x 3 convolution with one pixel of zeros around its image.

    ``x`` [batch, channels in, height, width], ``weight`` [channels out, channels in, 3, 3], both in fp32; ``stride`` 1
    or 2.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: int

    @classmethod
    def of(
        cls, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *settings: Any
    ) -> Convolution | None:
        """The one that a call of ``conv2d`` computes, if it is such a one."""
        if len(settings) != 4 or weight.shape[2:] != (3, 3) or x.dim() != 4 or not are_plain(x, weight):
            return None
        stride, padding, dilation, groups = settings
        is_usual = stride in ((1, 1), (2, 2)) and padding == dilation == (1, 1) and groups == 1
        return cls(x, weight, bias, stride[0]) if is_usual else None

    def faster(self) -> Callable[[], torch.Tensor] | None:
        """What computes it faster than PyTorch's choice, if anything does."""
        batch, channels, *sides = self.x.shape
        height, width = (-(-side // self.stride) for side in sides)
        if batch * height * width <= SMALL:
            is_heavy = self.weight.numel() >= MIN_WEIGHTS
            return self.as_product if is_heavy and product_is_faster(batch, height, width) else None
        if self.stride == 2 or min(channels, len(self.weight)) < MIN_CHANNELS:
            return None
        height, width = min(height, MEASURED_SIDE), min(width, MEASURED_SIDE)
        batch = min(batch, MEASURED_SIDE**2 // (height * width))
        return self.by_winograd if winograd_is_faster(batch, height, width) else None

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
        """[batch, channels out, height, width]. NNPACK transforms the weights for every image: it gets several, one
        above the other, or a band of one."""
        convolve = nnpack()
        assert convolve is not None
        batch, channels, height, width = self.x.shape
        rows = _rows(width, max(channels, len(self.weight)))
        if batch == 1 and height <= rows:
            return convolve(self.x, self.weight, self.bias, 1)
        made = self.x.new_empty(batch, len(self.weight), height, width)
        zeros = self.x.new_zeros(1, channels, 1, width)
        for strip in _strips(batch, height, rows):
            stacked = torch.cat([some for part in strip for some in part.rows(self.x, zeros)], dim=2)
            convolved = convolve(stacked, self.weight, self.bias, (0, 1))
            top = 0
            for part in strip:
                made[part.image, :, part.top : part.end] = convolved[0, :, top : top + part.height]
                top += part.height + HALO
        return made


class _Part(NamedTuple):
    """Rows of an image of a batch, from ``top`` to before ``end``."""

    image: int
    top: int
    end: int

    @property
    def height(self) -> int:
        return self.end - self.top

    def rows(self, x: torch.Tensor, zeros: torch.Tensor) -> list[torch.Tensor]:
        """[1, channels, rows, width] each: with the row above and the one below, of zeros at the image's edges."""
        own = x[self.image : self.image + 1, :, max(0, self.top - 1) : self.end + 1]
        return [zeros] * (self.top == 0) + [own] + [zeros] * (self.end == x.shape[2])


@cache
def product_is_faster(batch: int, height: int, width: int) -> bool:
    """Whether a convolution of KOALA's deepest blocks, with an output of that size, is faster as a product; measured
    once for each size, in some 100 to 500 ms."""
    if not has_one_dnn():
        return False
    measured = _ones(batch, WIDE, height, width)
    return speedup(measured.usual, measured.as_product, times=2) >= MIN_SPEEDUP


@cache
def winograd_is_faster(batch: int = 1, height: int = MEASURED_SIDE, width: int = MEASURED_SIDE) -> bool:
    """Whether a convolution of images of that size is faster by Winograd's algorithm; measured once for each size, in
    some 100 to 500 ms."""
    if nnpack() is None:
        return False
    measured = _ones(batch, MEASURED_CHANNELS, height, width)
    return speedup(measured.usual, measured.by_winograd, times=2) >= MIN_SPEEDUP


def _ones(batch: int, channels: int, height: int, width: int) -> Convolution:
    return Convolution(torch.ones(batch, channels, height, width), torch.ones(channels, channels, 3, 3), None, 1)


@cache
def nnpack() -> Callable[..., torch.Tensor] | None:
    """NNPACK's convolution, if this PyTorch and this processor have it."""
    # Neither function has a public name. The second works only after the first was asked, which sets NNPACK up.
    available = getattr(torch, "_nnpack_available", lambda: False)
    convolve: Callable[..., torch.Tensor] | None = getattr(torch, "_nnpack_spatial_convolution", None)
    return convolve if available() else None


def _rows(width: int, channels: int) -> int:
    """Rows of an image, whole tiles, that NNPACK's memory is enough for."""
    return TILE * max(1, WORKSPACE // (-(-width // TILE) * TRANSFORMED * channels))


def _strips(batch: int, height: int, rows: int) -> Iterator[list[_Part]]:
    """A batch in strips of so many rows at most: as many images as fit, or else bands of one, of whole tiles."""
    images = [_Part(image, 0, height) for image in range(batch)]
    if height <= rows:
        together = max(1, (rows + HALO) // (height + HALO))
        yield from (images[first : first + together] for first in range(0, batch, together))
        return
    tiles = -(-height // TILE)
    band = TILE * -(-tiles // -(-tiles * TILE // rows))
    for part in images:
        yield from ([part._replace(top=top, end=min(height, top + band))] for top in range(0, height, band))
