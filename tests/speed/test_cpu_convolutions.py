"""3 x 3 convolutions by other routines: the same, and only where they are faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from koala_sdxl.host.accelerate import cpu_convolutions as convolutions
from koala_sdxl.host.accelerate import cpu_routines as kernels
from koala_sdxl.host.accelerate import cpu_winograd
from koala_sdxl.host.accelerate.plan import PRESETS
from tests.speed import sampling
from tests.speed.sampling import noting, pictures, prompts, run
from tools.measure import parity
from tools.tiny.evaluate import grid_prompts

said = pytest.fixture(sampling.said)
faster = pytest.fixture(sampling.faster)
by_winograd = pytest.fixture(sampling.by_winograd)

USUAL = ((1, 1), (1, 1), (1, 1), 1)
"""Stride, padding, dilation and groups of most of a U-Net's convolutions."""


def compared(size: tuple[int, int, int], channels_out: int, stride: int = 1) -> Iterator[tuple[torch.Tensor, ...]]:
    """A convolution of 24 channels, its ``size`` a batch, height and width: by ``FasterLayers``, by PyTorch, and in
    fp64; in both orders of memory, with and without a bias."""
    batch, height, width = size
    x, weight = torch.randn(batch, 24, height, width), torch.randn(channels_out, 24, 3, 3)
    for order in (torch.contiguous_format, torch.channels_last):
        for bias in (torch.randn(channels_out), None):
            layer: Any = (x.to(memory_format=order), weight, bias, (stride, stride), *USUAL[1:])
            exactly: Any = [part.double() if torch.is_tensor(part) else part for part in layer]
            wanted = torch.nn.functional.conv2d(*exactly)
            with kernels.FasterLayers():
                found = torch.nn.functional.conv2d(*layer)
            assert found.is_contiguous()
            assert found.shape == wanted.shape
            yield found, torch.nn.functional.conv2d(*layer), wanted


@pytest.fixture
def as_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of the convolutions that are computed as products, every one that can be and has 99 weights."""
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(convolutions, "MIN_WEIGHTS", 99)
    monkeypatch.setattr(convolutions, "product_is_faster", noting(sizes, True))
    return sizes


@pytest.mark.parametrize(
    ("size", "stride", "output"),
    [((2, 8, 8), 1, (2, 8, 8)), ((1, 6, 10), 2, (1, 3, 5)), ((3, 7, 5), 2, (3, 4, 3)), ((1, 1, 1), 1, (1, 1, 1))],
)
def test_a_small_convolution_as_a_product_is_the_same(
    size: tuple[int, int, int], stride: int, output: tuple[int, int, int], as_products: list[tuple[int, ...]]
) -> None:
    for found, _, wanted in compared(size, 16, stride):
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-6
    assert as_products == [output] * 4


@pytest.mark.parametrize(
    ("x", "weight", "settings"),
    [
        ((1, 24, 32, 32), (16, 24, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
        ((1, 24, 8, 8), (16, 24, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
        ((1, 24, 8, 8), (16, 24, 3, 3), ((1, 1), (0, 0), (1, 1), 1)),
        ((1, 24, 8, 8), (16, 24, 3, 3), ((1, 1), (2, 2), (2, 2), 1)),
        ((1, 24, 8, 8), (16, 12, 3, 3), ((1, 1), (1, 1), (1, 1), 2)),
        ((1, 24, 8, 8), (16, 24, 3, 3), ((1, 2), (1, 1), (1, 1), 1)),
        ((1, 1, 8, 8), (1, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    ],
    ids=["large", "1 x 1", "no border", "dilated", "groups", "two strides", "few weights"],
)
def test_other_convolutions_stay(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    settings: tuple[Any, ...],
    as_products: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolutions, "SMALL", 1000)
    layer = (torch.randn(x), torch.randn(weight), None, *settings)
    wanted = torch.nn.functional.conv2d(*layer)
    with kernels.FasterLayers():
        assert torch.equal(torch.nn.functional.conv2d(*layer), wanted)
        in_bf16 = torch.nn.functional.conv2d(layer[0].bfloat16(), layer[1].bfloat16(), None, *settings)
    assert in_bf16.dtype == torch.bfloat16
    assert not as_products


def test_a_layer_whose_weights_change_in_place_is_computed_with_the_new_ones(
    as_products: list[tuple[int, ...]],
) -> None:
    """As LoRAs do, between runs and within them."""
    layer = torch.nn.Conv2d(24, 16, 3, padding=1, bias=False)
    x = torch.randn(1, 24, 8, 8)
    with torch.inference_mode(), kernels.FasterLayers():
        before = layer(x)
        layer.weight.mul_(2)
        after = layer(x)
    assert torch.allclose(after, 2 * before, atol=1e-5)
    assert len(as_products) == 2


@pytest.mark.parametrize(
    ("size", "workspace"),
    [
        ((1, 40, 25), 2**28),
        ((2, 33, 30), 2**28),
        ((5, 19, 31), 4 * 6 * 256 * (32 + 24)),
        ((5, 19, 31), 7 * 6 * 256 * (32 + 24)),
        ((1, 64, 40), 3 * 7 * 256 * (32 + 24)),
        ((2, 41, 24), 1),
        ((3, 2, 99), 2**28),
    ],
    ids=["one image", "two at once", "each alone", "two, two and one", "four bands", "bands of a tile", "low"],
)
def test_a_large_convolution_by_winograds_algorithm_is_the_same_but_for_rounding(
    size: tuple[int, int, int],
    workspace: int,
    by_winograd: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_winograd, "WORKSPACE", workspace)
    for found, usual, wanted in compared(size, 32):
        assert not torch.equal(found, usual)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert by_winograd == [size] * 4


@pytest.mark.parametrize(
    ("batch", "height", "rows", "strips"),
    [
        (3, 16, 36, [[(0, 0, 16), (1, 0, 16)], [(2, 0, 16)]]),
        (2, 16, 30, [[(0, 0, 16)], [(1, 0, 16)]]),
        (4, 7, 30, [[(0, 0, 7), (1, 0, 7), (2, 0, 7)], [(3, 0, 7)]]),
        (1, 40, 18, [[(0, 0, 18)], [(0, 18, 36)], [(0, 36, 40)]]),
        (1, 40, 36, [[(0, 0, 24)], [(0, 24, 40)]]),
        (2, 7, 6, [[(0, 0, 6)], [(0, 6, 7)], [(1, 0, 6)], [(1, 6, 7)]]),
    ],
)
def test_a_batch_is_convolved_in_as_few_strips_as_there_is_room_for(
    batch: int, height: int, rows: int, strips: list[list[tuple[int, int, int]]]
) -> None:
    divided = cpu_winograd._together if height <= rows else cpu_winograd._bands
    assert list(divided(batch, height, rows)) == strips


def test_memory_is_counted_as_nnpack_takes_it() -> None:
    for channels_in, channels_out in ((128, 128), (512, 512), (320, 960)):
        rows = cpu_winograd._rows(1024, channels_in, channels_out)
        taken, of_a_row = (256 * 171 * count * (channels_out + 128) for count in (rows // 6, 1))
        assert taken <= cpu_winograd.WORKSPACE < taken + of_a_row


def test_how_large_a_convolution_is_decides_which_routine_is_asked_for(
    by_winograd: list[tuple[int, ...]], as_products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "MIN_CHANNELS", 8)
    weight = torch.empty(9, 8, 3, 3)
    for size in ((2, 16, 16), (3, 16, 16), (1, 64, 64)):
        batch, height, width = size
        assert convolutions.Convolution(torch.ones(batch, 8, height, width), weight, None).faster_way()
    assert as_products == [(2, 16, 16)]
    assert by_winograd == [(3, 16, 16), (1, 64, 64)]
    for channels, stride in ((7, 1), (8, 2)):
        x = torch.ones(1, channels, 64, 64)
        assert convolutions.Convolution(x, torch.empty(9, channels, 3, 3), None, stride).faster_way() is None


def test_sizes_are_measured_once_and_the_largest_for_all_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each number of threads: NNPACK keeps the one that it began with."""
    measured: list[tuple[Any, ...]] = []
    threads = 1

    def is_faster(usual: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor], times: int) -> float:
        measured.append(tuple(usual.__self__.x.shape))  # type: ignore[attr-defined]  # of a convolution
        return 2.0

    monkeypatch.setattr(convolutions, "speedup", is_faster)
    monkeypatch.setattr(cpu_winograd, "nnpack", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    convolutions._is_faster.cache_clear()
    try:
        for size in ((3, 4, 4), (3, 4, 4), (9, 32, 32), (2, 128, 96), (1, 64, 64), (1, 4, 128)):
            assert convolutions.winograd_is_faster(*size)
        assert convolutions.winograd_is_faster_for_large_images()
        assert measured == [(3, 640, 4, 4), (4, 640, 32, 32), (1, 640, 64, 64), (1, 640, 4, 64)]
        threads = 2
        assert convolutions.winograd_is_faster(3, 4, 4)
        assert measured[4:] == [(3, 640, 4, 4)]
        assert convolutions.product_is_faster(1, 2, 2) == convolutions.product_is_faster(1, 2, 2)
        assert measured[5:] in ([(1, 1280, 2, 2)], [])  # empty where PyTorch has no oneDNN
    finally:
        convolutions._is_faster.cache_clear()


@pytest.mark.parametrize(("peak", "is_used"), [(10.0, True), (1e3, False), (-1e3, False), (float("nan"), False)])
def test_an_image_with_a_pixel_much_larger_than_the_others_is_convolved_as_ever(
    peak: float, is_used: bool, by_winograd: list[tuple[int, ...]]
) -> None:
    """By Winograd's algorithm what lies beside it would get wrong."""
    layer: Any = (torch.randn(1, 24, 40, 40), torch.randn(32, 24, 3, 3), None, *USUAL)
    layer[0][0, 3, 21, 22] = peak
    usual = torch.nn.functional.conv2d(*layer)
    with kernels.FasterLayers():
        found = torch.nn.functional.conv2d(*layer)
    assert by_winograd
    assert torch.equal(found.nan_to_num(), usual.nan_to_num()) != is_used
    assert float((found - usual).nan_to_num().abs().max() / usual.nan_to_num().abs().median()) < 1e-3


def test_a_pytorch_without_nnpack_convolves_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = (torch.randn(1, 128, 32, 32), torch.randn(128, 128, 3, 3), None, *USUAL)
    probes: tuple[Any, ...] = (cpu_winograd.nnpack, convolutions._is_faster)
    for probe in probes:
        probe.cache_clear()
    monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: False)
    try:
        with kernels.FasterLayers():
            found = torch.nn.functional.conv2d(*layer)
    finally:
        for probe in probes:
            probe.cache_clear()
    assert torch.equal(found, torch.nn.functional.conv2d(*layer))


def test_a_picture_by_winograds_algorithm_is_the_same(
    faster: Callable[..., Any], by_winograd: list[tuple[int, ...]]
) -> None:
    """Large enough for the algorithm in two of koala-tiny's three levels."""
    texts = prompts(grid_prompts(216)[0][:1])

    def large(model: Any) -> torch.Tensor:
        return run(model, texts, latent={"samples": torch.zeros(1, 4, 64, 64)}, preset=sampling.BASE | {"steps": 4})

    found, wanted = large(faster(PRESETS["exact"])), large(parity.tiny_models()[0])
    assert {height for _, height, _ in by_winograd} == {32, 64}
    assert not torch.equal(found, wanted)
    assert float((pictures(found) - pictures(wanted)).abs().max()) <= 1 / 255


@pytest.mark.parametrize("bias", [torch.ones(3), torch.ones(1, 32), torch.ones(32).bfloat16()])
def test_a_bias_that_does_not_fit_is_refused_as_ever(bias: torch.Tensor, by_winograd: list[tuple[int, ...]]) -> None:
    with pytest.raises(RuntimeError), kernels.FasterLayers():
        torch.nn.functional.conv2d(torch.randn(1, 24, 40, 40), torch.randn(32, 24, 3, 3), bias, *USUAL)
    assert not by_winograd
