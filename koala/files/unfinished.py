"""Where something is written until it is finished: a folder beside its place, which is cleared away in any case.

A writer holds a lock on its folder. A folder without one belongs to a process that was killed: the next writer beside
it deletes it.
"""

from __future__ import annotations

import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PATTERN = f"koala-{'[0-9a-f]' * 32}.partial"
"""What the folders' names match."""
LOCK = "lock"
GRACE = 60
"""Seconds: a folder may be made and not locked yet."""


@contextmanager
def unfinished(parent: Path) -> Iterator[Path]:
    """Yield an unused path in a new folder in ``parent``; the folder is deleted in the end, with whatever is there.

    The names are as short as those of small files, and have no ending by which anything would list them. Raises OSError
    where the folder cannot be made.
    """
    _delete_abandoned(parent)
    folder = parent / f"koala-{uuid.uuid4().hex}.partial"
    folder.mkdir()
    try:
        with (folder / LOCK).open("wb") as lock:
            _take(lock)
            yield folder / "content"
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what led here matters more than a failure to tidy up


def _delete_abandoned(parent: Path) -> None:
    """Delete the folders here whose writers are gone. One whose writer cannot be asked for is left alone."""
    for lock in parent.glob(f"{PATTERN}/{LOCK}"):
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > GRACE and _is_abandoned(lock):
                shutil.rmtree(lock.parent)


if sys.platform == "win32":

    def _take(lock: IO[bytes]) -> None:
        """An open file is lock enough: Windows deletes none."""

    def _is_abandoned(lock: Path) -> bool:
        lock.unlink()  # raises where it is open
        return True

else:
    import fcntl

    def _take(lock: IO[bytes]) -> None:
        with suppress(OSError):  # a file system without locks: then nobody can take it either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _is_abandoned(lock: Path) -> bool:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process has it
        return True
