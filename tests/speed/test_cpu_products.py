"""Products by oneDNN: which they are, and what is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koala_sdxl.host.accelerate import cpu_products as products
from koala_sdxl.host.accelerate import cpu_routines as kernels
from tests.speed.sampling import noting


def test_one_dnn_takes_plain_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "one_dnn_is_faster", lambda *_: True)
    rows, weight, bias = torch.randn(2, 100, 64), torch.randn(32, 64), torch.randn(32)
    wanted = torch.nn.functional.linear(rows, weight, bias)
    with kernels.FasterLayers():
        assert torch.allclose(torch.nn.functional.linear(rows, weight, bias), wanted, atol=1e-4)
        assert torch.nn.functional.linear(rows.half(), weight.half()).dtype == torch.float16
        few = torch.nn.functional.linear(rows[0, :2], weight, bias)
    assert torch.equal(few, torch.nn.functional.linear(rows[0, :2], weight, bias))


def test_a_product_that_is_not_faster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(kernels, "one_dnn_is_faster", noting(asked, False))
    rows, weight = torch.randn(2, 100, 64), torch.randn(32, 64)
    with kernels.FasterLayers():
        assert torch.equal(torch.nn.functional.linear(rows, weight), rows @ weight.T)
    assert asked == [(64, 32)]


def test_the_processor_is_measured_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Any, ...]] = []
    monkeypatch.setattr(products, "speedup", noting(measured, 2.0))
    products.one_dnn_is_faster.cache_clear()
    assert [products.one_dnn_is_faster(96, 64), products.one_dnn_is_faster(96, 64)] == [True, True]
    products.one_dnn_is_faster.cache_clear()
    assert len(measured) == 1


def test_how_many_times_faster_takes_the_shortest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 0.0, 4.0, 0.0, 3.0, 0.0, 6.0, 0.0, 2.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert products.speedup(lambda: None, lambda: 0, times=2) == 2
