"""When a file was last changed: what tells a replaced or overwritten file from the one that was read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """Two stamps of a path differ where its file was replaced, or written to in place.

    The inode is not in it: some network file systems number their files anew each time.
    """

    size: int
    """Bytes."""
    modified: int
    """Time of the last write, in nanoseconds; tools that copy times may set it."""
    changed: int
    """Time of the last change of contents, name or mode, in nanoseconds, which no tool sets; on Windows, when the file
    was made."""


def stamp(path: Path | int) -> Stamp:
    """A file's stamp, by its path or the number of the open file; of a link, its target's. Raises OSError."""
    found = os.stat(path)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def fingerprint(paths: Iterable[Path]) -> str:
    """Changes when one of these files is replaced, overwritten in place, deleted or made."""
    return ";".join(f"{path}:{_state(path)}" for path in paths)


def _state(path: Path) -> str:
    try:
        return ":".join(map(str, stamp(path)))
    except OSError:
        return "absent"
