"""The benchmark's measurements, in docs/benchmarks.json: every one that was made, with its date."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tools.measure import history

NAME = "benchmarks.json"
SHARED = ("macs", "quality")
"""Sections that tell nothing of the machine: they count multiplications, and compare images."""
Sections = dict[str, history.Entry]


class Machine(NamedTuple):
    """What the figures of one table were measured on. Whatever differs here is another machine."""

    device: str
    gpu: str
    cpu: str
    units: str
    """Vector units of the processor; empty in old entries."""
    threads: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Machine:
        """The one that an entry was measured on."""
        about = entry["machine"]
        return cls(entry["device"], about["gpu"], about["cpu"], about.get("units", ""), about["threads"])

    def __str__(self) -> str:
        units = f" ({self.units})" if self.units else ""
        return f"{self.gpu + ', ' if self.gpu else ''}{self.cpu}{units}, {self.threads} threads"


def read(folder: Path) -> dict[Machine, Sections]:
    """Each machine's newest entry of every section, but for ``SHARED``; the machine that was measured last comes first.

    Raises UserError.
    """
    found: dict[Machine, Sections] = {}
    for entry in history.read(folder / NAME):
        if entry["section"] in SHARED:
            continue
        machine = Machine.of(entry)
        found[machine] = {**found.pop(machine, {}), entry["section"]: entry}  # popped: the last one measured is last
    return dict(reversed(found.items()))


def shared(folder: Path) -> Sections:
    """The newest entry of each section that tells nothing of the machine. Raises UserError."""
    return {entry["section"]: entry for entry in history.read(folder / NAME) if entry["section"] in SHARED}


def add(folder: Path, device: str, section: str, machine: dict[str, Any], figures: dict[str, Any]) -> None:
    """Add one section's figures, measured today. Raises UserError."""
    entry = {"device": device, "section": section, "machine": machine, "figures": figures}
    history.add(folder / NAME, entry)
