"""What was measured, in docs/benchmarks.json: device -> section -> when, where and what."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tools.harness.errors import UserError

NAME = "benchmarks.json"
Results = dict[str, dict[str, dict[str, Any]]]


def read(folder: Path) -> Results:
    """All that is kept, empty before the first measurement. Raises UserError for a file that is no JSON."""
    file = folder / NAME
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file}: no JSON ({error}); expected what `dev.py bench` wrote. Restore or remove it."
        ) from None


def keep(folder: Path, device: str, section: str, about: dict[str, Any], figures: dict[str, Any]) -> None:
    """Put one section's figures in place of its older ones; the file is replaced whole or not at all."""
    results = read(folder)
    entry = {"measured": time.strftime("%Y-%m-%d"), "about": about, "figures": figures}
    results.setdefault(device, {})[section] = entry
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{NAME}.part"
    aside.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    os.replace(aside, folder / NAME)
