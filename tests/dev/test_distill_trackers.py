"""A distillation's metrics in TensorBoard and W&B: what is read back, and what a resumed run adds."""

from __future__ import annotations

import csv
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from koala_sdxl.distill import trackers
from koala_sdxl.distill.config import LogTable
from koala_sdxl.distill.errors import UserError
from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, run

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)

STEPS = {**SETTINGS["training"], "steps": 4, "checkpoint_every": 2, "keep": 3}


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / trackers.LOGS / trackers.PROJECT))
    found.Reload()
    return found


def table(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def again(folder: Path) -> None:
    """The finished run as one that was killed after its third step."""
    shutil.rmtree(folder / "result")
    shutil.rmtree(folder / "checkpoints" / "step-0000004")


@pytest.mark.nightly
def test_a_resumed_run_goes_on_in_the_same_tensorboard_log(place: Path) -> None:
    tables: dict[str, dict[str, Any]] = {
        "training": STEPS,
        "validation": {"images": 3, "every": 2},
        "log": {"every": 1, "to": ["csv", "tensorboard"]},
    }
    run(place, "logged", **tables)
    again(place / "logged")
    assert run(place, "logged", **tables)[0] == "resuming from step 2"
    found, rows = events(place / "logged"), table(place / "logged" / "metrics.csv")
    assert {"loss", "task", "output", "feature", "learning_rate", "images_per_s"} <= set(found.Tags()["scalars"])
    for name in ("loss", "learning_rate"):
        scalars = found.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4]
        assert [scalar.value for scalar in scalars] == pytest.approx([row[name] for row in rows])
    held_out = table(place / "logged" / "validation.csv")
    scalars = found.Scalars("validation/loss")
    assert [scalar.step for scalar in scalars] == [row["step"] for row in held_out] == [2, 4]
    assert [scalar.value for scalar in scalars] == pytest.approx([row["loss"] for row in held_out])


def test_a_format_without_its_package_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    trackers.require_installed(LogTable())
    with pytest.raises(UserError, match=r"^log\.to: the package wandb is not installed; .* Run pip install wandb, or "):
        trackers.require_installed(LogTable(to=("csv", "wandb")))


def test_a_log_that_cannot_be_written_is_refused(place: Path) -> None:
    folder = place / "unwritable"
    folder.mkdir()
    (folder / trackers.LOGS).write_text("a file")
    said = distill_runs.refused(place, "unwritable", log={"to": ["tensorboard"]})
    assert said.startswith("log.to = ['tensorboard'] could not be started (")
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_a_resumed_run_is_the_same_to_wandb(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tables: dict[str, dict[str, Any]] = {"training": STEPS, "log": {"every": 1, "to": ["wandb"]}}
    run(place, "offline", **tables)
    again(place / "offline")
    run(place, "offline", **tables)
    logs = place / "offline" / trackers.LOGS
    identity = (logs / trackers.RUN_ID).read_text()
    folders = sorted((logs / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{identity}") for folder in folders)
    assert all((folder / f"run-{identity}.wandb").stat().st_size > 0 for folder in folders)
