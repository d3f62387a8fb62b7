"""Metrics of a run: means between two rows, and a CSV file that a resumed run continues."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process


class Means:
    """Means over all processes of the values added since the last row; saved with each checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, values: Mapping[str, torch.Tensor], accelerator: Accelerator) -> None:
        means = accelerator.reduce(torch.stack([value.float() for value in values.values()]), "mean").tolist()
        for name, value in zip(values, means, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value * accelerator.num_processes
        self.count += accelerator.num_processes  # a run may be resumed by another number of processes

    def take(self) -> dict[str, float]:
        """Return the means and reset them."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, object]:
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]


class CsvTracker(GeneralTracker):
    """A tracker for accelerate that writes a CSV file: one row per call, the first column is the step."""

    name = "csv"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def resume_from(self, step: int) -> None:
        """Drop the rows that were written after the checkpoint from which a run resumes."""
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row[0] == "step" or int(row[0]) <= step]
            with self.path.open("w", newline="") as file:
                csv.writer(file).writerows(rows)

    @on_main_process
    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *values.values()])
