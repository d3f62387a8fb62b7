"""The study's figures in docs/distillation.json: every measurement that was made, with its date and machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.harness.testhost import ROOT
from tools.measure import history

from . import runs

FILE = ROOT / "docs" / "distillation.json"
RUN = "run"
OTHERS = ("teacher", "before", "addons", "effects", "few_steps", "dry_run")
"""Measurements beside the runs. "before" is the koala-tiny that the pack had before a distilled one took its place,
judged as the teacher is; no run makes it again."""


def add_new(work: Path, file: Path = FILE) -> None:
    """Add what the work folder holds and the file does not, or holds with other figures. Raises UserError."""
    found = [(RUN, name, figures) for name, figures in runs.results(work).items()]
    for kind in OTHERS:
        path = work / "runs" / f"{kind}.json"
        if path.exists():
            found.append((kind, "", json.loads(path.read_text("utf-8"))))
    stored = history.newest(history.read(file), "kind", "name")
    for kind, name, figures in found:
        machine = figures.pop("computer", {})
        entry = {"kind": kind, "name": name, "machine": machine, "figures": figures}
        if any(stored.get((kind, name), {}).get(key) != value for key, value in entry.items()):
            history.add(file, entry)


def newest(file: Path = FILE) -> dict[str, Any]:
    """The newest figures of everything: "runs" by name, and those of ``OTHERS`` that were measured. Each has its
    machine as "computer" where that is known. Raises UserError."""
    data: dict[str, Any] = {"runs": {}}
    for (kind, name), entry in history.newest(history.read(file), "kind", "name").items():
        figures = {**entry["figures"], **({"computer": entry["machine"]} if entry["machine"] else {})}
        if kind == RUN:
            data["runs"][name] = figures
        else:
            data[kind] = figures
    data["runs"] = {run.name: data["runs"][run.name] for run in runs.RUNS if run.name in data["runs"]}
    return data
