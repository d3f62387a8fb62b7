"""How passes are executed on a GPU, shown on the CPU: captured by a stand-in for CUDA graphs, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from koala_sdxl.host.accelerate.strategy import Strategy
from tests.speed import execution_cases as cases
from tests.speed.execution_cases import Case
from tests.speed.recorders import Operations, Reruns

CAPTURED = Strategy(recorder=Operations)
BOTH = Strategy(True, Reruns)
NEAR = 75.0  # decibels; rounding in fp32


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.put_lora(tmp_path, monkeypatch)


@pytest.mark.parametrize("strategy", [CAPTURED, BOTH], ids=["captured", "compiled and captured"])
@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.__name__)
def test_case(case: Callable[[Case], None], strategy: Strategy, loras: None) -> None:
    cases.check(case, strategy, NEAR)
