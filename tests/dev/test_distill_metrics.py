"""A distillation's learning rate and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from koala_sdxl.distill import train
from koala_sdxl.distill.config import TrainingTable
from koala_sdxl.distill.metrics import CsvTracker, Means


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    table = TrainingTable(steps=1000, warmup=10, final_rate=0.1)
    rates = [train.rate(table, step) for step in range(1000)]
    assert rates[:9] == pytest.approx([(step + 1) / 10 for step in range(9)], rel=1e-3)
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert train.rate(table, 500) == pytest.approx((1 + 0.1) / 2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert train.rate(TrainingTable(steps=5, warmup=0, final_rate=1.0), 0) == 1
    assert {train.rate(TrainingTable(steps=5, warmup=0, final_rate=1.0), step) for step in range(5)} == {1}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_means_begin_anew_after_a_row_and_resume_from_a_checkpoint(accelerator: Accelerator) -> None:
    means, later = Means(), Means()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value), "task": torch.tensor(2 * value)})
    means.fetch(accelerator)
    later.load_state_dict(means.state_dict())
    later.add({"loss": torch.tensor(7.0), "task": torch.tensor(0.0)})
    later.fetch(accelerator)
    assert means.take() == {"loss": 3, "task": 6}
    assert later.take() == {"loss": 4, "task": 4.5}
    means.add({"loss": torch.tensor(5.0)})
    means.fetch(accelerator)
    assert means.take() == {"loss": 5}


def test_a_run_that_goes_on_drops_the_rows_after_its_checkpoint(tmp_path: Path, accelerator: Accelerator) -> None:
    path = tmp_path / "metrics.csv"
    CsvTracker(path).resume_from(0)
    assert not path.exists()
    for step in (1, 2, 9, 10):
        CsvTracker(path).log({"loss": step / 2, "rate": 1}, step=step)
    assert path.read_text().splitlines() == ["step,loss,rate", "1,0.5,1", "2,1.0,1", "9,4.5,1", "10,5.0,1"]
    CsvTracker(path).resume_from(9)
    assert path.read_text().splitlines() == ["step,loss,rate", "1,0.5,1", "2,1.0,1", "9,4.5,1"]
    CsvTracker(path).resume_from(0)
    CsvTracker(path).log({"loss": 3.0, "rate": 1}, step=1)
    assert path.read_text().splitlines() == ["step,loss,rate", "1,3.0,1"]


def test_metrics_that_a_killed_run_left_empty_are_begun_anew(tmp_path: Path, accelerator: Accelerator) -> None:
    path = tmp_path / "metrics.csv"
    path.touch()
    CsvTracker(path).resume_from(4)
    CsvTracker(path).log({"loss": 3.0}, step=5)
    assert path.read_text().splitlines() == ["step,loss", "5,3.0"]
