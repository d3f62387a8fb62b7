"""The machine's own speed: GFLOP/s of the operations that KOALA's multiplications are in, GB/s of reading weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn.functional import conv2d, linear

from koala_sdxl.host.accelerate.cpu_convolutions import Convolution
from koala_sdxl.host.accelerate.cpu_products import by_one_dnn, has_one_dnn
from koala_sdxl.host.accelerate.cpu_winograd import nnpack
from tools.measure.bench import meter

CONVOLUTIONS = (
    (2, 320, 320, 64),
    (2, 640, 320, 64),
    (2, 640, 640, 32),
    (2, 1280, 640, 32),
    (2, 1280, 1280, 16),
    (2, 2560, 1280, 16),
)
"""Batch, channels in and out, side: 3 x 3 convolutions of a guided step at 512 px."""
DECODER = ((1, 512, 512, 64), (1, 512, 512, 128), (1, 256, 256, 256), (1, 128, 128, 512))
"""The same of the VAE's decoder at 512 px."""
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
SECONDS = 0.5  # for each rate, after a first run
LEAST = 0.01  # seconds between two readings of the clock: a GPU's queue has to be filled, and to run empty


def measured(device: str) -> dict[str, Any]:
    """Rates of the device's usual type, fp32 on the CPU, fp16 on a GPU; on the CPU those of bf16, too."""
    place: dict[str, Any] = {"device": device, "dtype": torch.float16 if device == "cuda" else torch.float32}
    side = SIDE[device]
    a, b = torch.randn(side, side, **place), torch.randn(side, side, **place)
    products: dict[str, Callable[[], Any]] = {"PyTorch": lambda: linear(a, b)}
    if device == "cpu":
        a_bf16, b_bf16 = a.bfloat16(), b.bfloat16()
        products |= {"oneDNN": lambda: by_one_dnn(a, b)} if has_one_dnn() else {}
        products["bf16"] = lambda: linear(a_bf16, b_bf16)
    half = torch.randn(64, 1024, 1024).half()
    return {
        "side": side,
        "matmul": {how: 2e-9 * side**3 / _seconds(product) for how, product in products.items()},
        "unet": [_convolution(*shape, place) for shape in CONVOLUTIONS],
        "vae": [_convolution(*shape, place) for shape in DECODER],
        "fp16 to fp32": 4e-9 * half.numel() / _seconds(half.float),
    }


def _convolution(batch: int, c_in: int, c_out: int, side: int, place: dict[str, Any]) -> dict[str, Any]:
    x, weights = torch.randn(batch, c_in, side, side, **place), torch.randn(c_out, c_in, 3, 3, **place)
    flops = 2e-9 * batch * c_in * c_out * 9 * side**2
    x_last, weights_last = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weights))
    ways: dict[str, Callable[[], Any]] = {
        "contiguous": lambda: conv2d(x, weights, padding=1),
        "channels_last": lambda: conv2d(x_last, weights_last, padding=1),
    }
    if place["device"] == "cpu":
        x_bf16, weights_bf16 = x_last.bfloat16(), weights_last.bfloat16()
        if nnpack() is not None:
            ways["Winograd"] = Convolution(x, weights, None).by_winograd
        ways["bf16"] = lambda: conv2d(x_bf16, weights_bf16, padding=1)
    return {
        "shape": f"{batch} x {c_in} to {c_out} channels, {side} x {side}",
        "gflop": flops,
        **{how: flops / _seconds(work) for how, work in ways.items()},
    }


def _seconds(work: Callable[[], Any]) -> float:
    """Median time of a run; the first, which sets things up, does not count."""
    work()
    times = max(1, round(LEAST / meter.timed(work)[0]))

    def several() -> None:
        for _ in range(times):
            work()

    found: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(found) < 3 or time.perf_counter() < end:
        found.append(meter.timed(several)[0] / times)
    return median(found)
