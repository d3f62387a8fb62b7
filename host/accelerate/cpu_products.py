"""Matrix products on the CPU, by oneDNN where it is faster than MKL, which PyTorch uses: as on many processors, above
all on those that are not Intel's. What depends on the processor is measured, once for each shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear

MIN_SPEEDUP = 1.05
"""Another routine for the same arithmetic is used where it is at least this many times faster on this processor."""
MIN_ROWS = 128
"""Products with fewer rows than this (time embeddings) take too little time to matter."""
MEASURED_ROWS = MIN_ROWS
"""Rows of the products that are measured: with more of them, how the two compare hardly changes."""
WIDE = 1280
"""Channels of KOALA's deepest blocks, in and out."""


def speedup(usual: Callable[[], Any], other: Callable[[], Any], times: int = 3) -> float:
    """How many times faster the other is: shortest runs, in turns, after one of each that is not counted."""
    taken: dict[Callable[[], Any], list[float]] = {usual: [], other: []}
    for turn in range(1 + times):
        for run, found in taken.items():
            start = time.perf_counter()
            run()
            found += [time.perf_counter() - start] if turn else []
    return min(taken[usual]) / min(taken[other])


@cache
def one_dnn_is_faster(inputs: int = WIDE, outputs: int = WIDE) -> bool:
    """Whether oneDNN's product with so many features is: measured once for each, in some 10 to 100 ms."""
    if not has_one_dnn():
        return False
    rows, weight = torch.ones(MEASURED_ROWS, inputs), torch.ones(outputs, inputs)
    return speedup(lambda: linear(rows, weight), lambda: by_one_dnn(rows, weight)) >= MIN_SPEEDUP


def has_one_dnn() -> bool:
    """Whether this PyTorch has the routine of ``by_one_dnn``."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_one_dnn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear`` by oneDNN: ``rows`` [..., features in], ``weight`` [features out, features in], in fp32."""
    # The one way to oneDNN's fp32 product that needs no second, packed copy of the weights. It is PyTorch's own, for
    # its compiler, and has no public name.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def are_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether both are in fp32 on the CPU, and the weights nothing but that, in their usual order."""
    return (
        x.dtype is weight.dtype is torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.is_contiguous()
    )


def is_plain_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether ``by_one_dnn`` takes the arguments of a call of ``linear``, and it is large enough to matter."""
    return are_plain(rows, weight) and rows.numel() >= MIN_ROWS * weight.shape[1]
