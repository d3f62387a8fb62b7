"""The study's figures in docs/distillation.json: every measurement that was made, with its date and machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.harness.testhost import ROOT
from tools.measure import history

from . import runs

FILE = ROOT / "docs" / "distillation.json"
RUN = "run"
EFFECTS = "effects"
OTHERS = ("teacher", "before", "addons", EFFECTS, "few_steps", "dry_run")
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
    """The newest figures of everything: "runs" by name, and those of ``OTHERS`` that were measured; of the adapters'
    effects a list, as ``families`` gives it. Each has its machine as "computer" where that is known. Raises
    UserError."""
    data: dict[str, Any] = {"runs": {}}
    entries = history.read(file)
    for (kind, name), entry in history.newest(entries, "kind", "name").items():
        if kind == RUN:
            data["runs"][name] = _figures(entry)
        elif kind != EFFECTS:
            data[kind] = _figures(entry)
    data["runs"] = {run.name: data["runs"][run.name] for run in runs.RUNS if run.name in data["runs"]}
    if measured := [_figures(entry) for entry in entries if entry["kind"] == EFFECTS]:
        data[EFFECTS] = families(measured)
    return data


def _figures(entry: history.Entry) -> dict[str, Any]:
    return {**entry["figures"], **({"computer": entry["machine"]} if entry["machine"] else {})}


def families(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figures of adapters' effects, oldest first -> newest first, each with the effects that no newer one has: every
    family of an sdxl-tiny and its students is grown anew, so that figures of two cannot be compared."""
    found, known = [], set[str]()
    for figures in reversed(measured):
        rows = [row for row in figures["rows"] if row["effect"] not in known]
        if rows:
            carried = [one for one in figures["carried"] if one["name"].split("-refit-")[0] not in known]
            found.append({**figures, "rows": rows, "carried": carried})
        known |= {row["effect"] for row in rows}
    return found
