"""The folder of an interrupted run: what was computed before, each in a file that is there whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...koala.files.atomic_write import replace_file, write_safetensors, written_whole
from ...koala.files.stamp import stamp
from ..errors import UserError
from .settings import digest

State = dict[str, Tensor]
SECONDS = "seconds"
"""The metadata of a file that says how long its content took."""

FORMAT = {"files of the work folder": 3}
"""Counts up with what these files hold, so that an older version's are not gone on with."""


@dataclass(frozen=True)
class Work:
    """A folder for one run."""

    folder: Path

    def make(self) -> None:
        """Make the folder, if it is not there. Raises UserError where that fails."""
        with self._usable():
            self.folder.mkdir(exist_ok=True)

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, computed once for as long as it is not changed: SDXL's take a while."""
        kept, key, now = self.folder / "hashes.json", str(path.resolve()), [*stamp(path)]
        with self._usable():
            known = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
        if key not in known or known[key]["stamp"] != now:
            known[key] = {"stamp": now, "sha256": digest(path)}
            with self._usable():
                replace_file(kept, json.dumps(known))
        found: str = known[key]["sha256"]
        return found

    def open(self, origin: dict[str, Any]) -> None:
        """Write down what run this is, or check that the one there is the same. Raises UserError where it is not."""
        path, now = self.folder / "run.json", json.dumps(origin | FORMAT, indent=2) + "\n"
        with self._usable():
            if not path.exists():
                replace_file(path, now)
            begun = json.loads(path.read_text("utf-8"))
        if differing := [name for name, value in json.loads(now).items() if begun.get(name) != value]:
            raise UserError(
                f"{self.folder} holds an unfinished run with other {', '.join(differing)}; expected the same, to go on "
                f"with it. Delete that folder, or choose another --out."
            )

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} cannot be used ({error}); expected a folder of this command.") from None

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
