"""Measurements in a JSON file, each with its date: new ones are added, old ones stay.

The file holds a list of entries, oldest first. An entry is an object with ``date`` (YYYY-MM-DD), ``machine`` (what it
was measured on and with), ``figures``, and whatever tells one kind of measurement from another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.harness.errors import UserError

Entry = dict[str, Any]


def read(file: Path) -> list[Entry]:
    """Every entry, oldest first; none where there is no file. Raises UserError for a file that is not such a list."""
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); expected dated measurements. Restore or remove it.") from None
    if not (isinstance(entries, list) and all(isinstance(one, dict) and "date" in one for one in entries)):
        raise UserError(f"{file} is not a list of entries with a date each. Restore or remove it.")
    return entries


def add(file: Path, entry: Entry) -> None:
    """Add an entry with today's date. The file is replaced as a whole, or stays as it is."""
    from koala_sdxl.koala.files.atomic_write import replace_file  # which needs PyTorch; reading does not

    entries = [*read(file), {"date": time.strftime("%Y-%m-%d"), **entry}]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, as_text(entries))


def as_text(entries: Sequence[Entry]) -> str:
    """The file's text."""
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def newest(entries: Sequence[Entry], *keys: str) -> dict[tuple[Any, ...], Entry]:
    """The last entry of each kind, by its values of ``keys``, in the order in which the kinds first came."""
    return {tuple(entry[key] for key in keys): entry for entry in entries}
