"""Where the metrics go, by accelerate's trackers: CSV, TensorBoard, Weights & Biases. A resumed run continues each."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from ..koala.files.atomic_write import replace_file
from . import processes
from .config import Config, LogTable
from .errors import UserError
from .metrics import CsvTracker

PROJECT = "koala-distill"
"""The project of W&B, and the folder of TensorBoard's files in logs/."""
LOGS = "logs"
"""The folder of both, in the output folder."""
RUN_ID = "wandb-id.txt"
"""In the folder ``LOGS``: W&B knows the run by it."""


def require_installed(log: LogTable) -> None:
    """Raises UserError for a format whose package is not installed."""
    for package in log.to:
        if package != "csv" and find_spec(package) is None:
            raise UserError(
                f'log.to: the package {package} is not installed; expected it, as "{package}" is listed. Run '
                f"pip install {package}, or take it out of the list."
            )


def chosen(config: Config) -> list[str | GeneralTracker]:
    """What ``Accelerator`` takes as ``log_with``."""
    return [CsvTracker(config.output / "metrics.csv") if to == "csv" else to for to in config.log.to]


def start(config: Config, accelerator: Accelerator, step: int) -> None:
    """Begin each log, or continue it after optimiser step ``step``; called on every process.

    CSV and TensorBoard drop what was logged after that step, by a run that ended before its next checkpoint; W&B keeps
    it, and ignores the steps that it already has. Raises UserError where one cannot be started.
    """
    for tracker in accelerator.log_with:
        if isinstance(tracker, CsvTracker):
            tracker.resume_from(step)
    processes.on_every(accelerator, lambda: _start(config, accelerator, step))


def _start(config: Config, accelerator: Accelerator, step: int) -> None:
    settings: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}
    try:
        if "wandb" in config.log.to and accelerator.is_main_process:
            settings["wandb"] = _wandb(config)
        accelerator.init_trackers(PROJECT, init_kwargs=settings)
    except Exception as error:  # each tracker has its own
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"log.to = {list(config.log.to)} could not be started ({why}); expected a folder that can be written to, "
            f"and for W&B a login. Run wandb login, set WANDB_MODE=offline, or shorten the list."
        ) from None


def _wandb(config: Config) -> dict[str, Any]:
    logs = config.output / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / RUN_ID
    if not file.exists():
        replace_file(file, uuid.uuid4().hex)
    return {
        "id": file.read_text("utf-8"),
        "resume": "allow",
        "name": config.output.resolve().name,
        "dir": str(logs),
        "config": config.model_dump(mode="json"),
    }


def log_measures(accelerator: Accelerator, measures: Mapping[str, float], step: int) -> None:
    """Log what validation found; in a CSV file it has one of its own."""
    named = {f"validation/{name}": value for name, value in measures.items()}
    for tracker in accelerator.trackers:
        if not isinstance(tracker, CsvTracker):
            tracker.log(named, step=step)
