"""The folder of an interrupted run: what was computed before, each in a file that is there whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...koala.files.atomic_write import replace_file, write_safetensors, written_whole
from ..errors import UserError

State = dict[str, Tensor]
SECONDS = "seconds"
"""The metadata of a file that says how long its content took."""


@dataclass(frozen=True)
class Work:
    """A folder for one run."""

    folder: Path

    def open(self, origin: dict[str, Any]) -> None:
        """Make the folder, or check that the run there is this one. Raises UserError where it is another, or where it
        cannot be made."""
        path, now = self.folder / "run.json", json.dumps(origin, indent=2) + "\n"
        try:
            self.folder.mkdir(exist_ok=True)
            if not path.exists():
                replace_file(path, now)
            begun = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} cannot be used ({error}); expected a folder of this command.") from None
        if differing := [name for name in origin if begun.get(name) != json.loads(now)[name]]:
            raise UserError(
                f"{self.folder} holds an unfinished run with other {', '.join(differing)}; expected the same, to go on "
                f"with it. Delete that folder, or choose another --out."
            )

    def once(self, name: str, make: Callable[[], State]) -> tuple[State, float]:
        """What ``make`` returns, or what it returned in the run that was interrupted; and the seconds it took."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            started = time.monotonic()
            state = make()
            seconds = {SECONDS: str(time.monotonic() - started)}
            with written_whole(path, sum(tensor.nbytes for tensor in state.values())) as aside:
                write_safetensors(aside, state, seconds)
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
                return found, float(file.metadata()[SECONDS])
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}). Delete it, and run again.") from None

    def delete(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
