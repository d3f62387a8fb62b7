"""Metrics of a run: means between two rows, and a CSV file that a resumed run continues."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process

from .divergence import Level


class Means:
    """Means over all processes of the values since the last row, and the loss's level; saved with each checkpoint.

    The values are summed where they are computed: fetching one makes the CPU wait for the GPU, so that happens once for
    a row or a checkpoint.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0
        self.level = Level()
        self._names: tuple[str, ...] = ()
        self._added: torch.Tensor | None = None
        self._passes = 0

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add the scalars of one forward pass of this process, always with the same names."""
        new = torch.stack([value.detach().float() for value in values.values()])
        self._names, self._passes = tuple(values), self._passes + 1
        self._added = new if self._added is None else self._added + new

    def fetch(self, accelerator: Accelerator) -> None:
        """Bring in what all processes have added; called on each, before ``take`` and ``state_dict``."""
        if self._added is None:
            return
        totals = accelerator.reduce(self._added, "sum").tolist()
        for name, total in zip(self._names, totals, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.count += self._passes * accelerator.num_processes  # a run may be resumed by another number of processes
        self._added, self._passes = None, 0

    def take(self) -> dict[str, float]:
        """Return the means of what was fetched and reset them."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, object]:
        return {"sums": dict(self.sums), "count": self.count, "level": dict(vars(self.level))}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]
        vars(self.level).update(state.get("level", {}))


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
        """Append a row. Values with names that are new get columns of their own, what is missing an empty field."""
        row = {"step": step, **values}
        rows: list[dict] = []
        columns: list[str] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                columns = list(reader.fieldnames or ())
                rows = list(reader) if columns and row.keys() - set(columns) else []
        if new := [name for name in row if name not in columns]:
            columns += new
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)
