"""3 x 3 convolutions in fp32 on the CPU, by other routines than PyTorch's choice where they are faster.

PyTorch has oneDNN compute them directly, for which it copies the weights into an order of its own every time.

- **Small images with many weights**, as in KOALA's deepest blocks: the copy takes longer than the convolution, and a
  matrix product is faster.
- **Large images**: Winograd's algorithm (cpu_winograd.py) computes 6 x 6 pixels of a channel with 64 multiplications
  instead of 324.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch.nn.functional import conv2d, pad

from . import cpu_winograd
from .cpu_products import MIN_SPEEDUP, WIDE, are_plain, by_one_dnn, has_one_dnn, speedup

SMALL = 512
"""Output pixels of a batch up to which a convolution may be faster as a product, and beyond which by Winograd's
algorithm: the more pixels, the more a product copies, and the less it matters that Winograd's algorithm copies all
weights, to seven times their size."""
MIN_WEIGHTS = 9 * WIDE * WIDE // 2
"""Small convolutions with fewer weights than this have too small a copy to save."""
MIN_CHANNELS = 128
"""Convolutions with fewer channels, in or out, take little time; Winograd's algorithm is not measured with so few."""
MEASURED_CHANNELS = 640
"""Channels in and out with which Winograd's algorithm is measured: those of KOALA's middle blocks."""
MEASURED_SIDE = 64
"""Images are measured up to this side, and batches up to its square in pixels: with more, how the two compare hardly
changes."""


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
        batch, _, *sides = self.x.shape
        height, width = (ceil(side / self.stride) for side in sides)
        if batch * height * width <= SMALL:
            is_heavy = self.weight.numel() >= MIN_WEIGHTS
            return self.as_product if is_heavy and product_is_faster(batch, height, width) else None
        return self.by_winograd if self.is_for_winograd() else None

    def is_for_winograd(self) -> bool:
        """Whether Winograd's algorithm is faster."""
        batch, channels, height, width = self.x.shape
        may_be = self.stride == 1 and min(channels, len(self.weight)) >= MIN_CHANNELS
        return may_be and batch * height * width > SMALL and winograd_is_faster(batch, height, width)

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
        """[batch, channels out, height, width], where ``nnpack()`` is there."""
        return cpu_winograd.convolve(self.x, self.weight, self.bias)


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
    return cpu_winograd.nnpack() is not None and _is_faster(
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
