"""The benchmark's measurements, in docs/benchmarks.json: every one that was made, with its date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.measure import history

NAME = "benchmarks.json"
Results = dict[str, dict[str, history.Entry]]


def read(folder: Path) -> Results:
    """Device -> section -> its newest entry, in the order in which sections were first measured. Raises UserError."""
    results: Results = {}
    for (device, section), entry in history.newest(history.read(folder / NAME), "device", "section").items():
        results.setdefault(device, {})[section] = entry
    return results


def add(folder: Path, device: str, section: str, machine: dict[str, Any], figures: dict[str, Any]) -> None:
    """Add one section's figures, measured today. Raises UserError."""
    entry = {"device": device, "section": section, "machine": machine, "figures": figures}
    history.add(folder / NAME, entry)
