"""What every kind of source gives: its images one after another, each with a name that stays the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from .config import DataTable
from .errors import UserError

Fetch = Callable[[], tuple[bytes, tuple[str, ...]]]
"""Returns an image's file content and its captions, one or more; raises Unusable where either is missing."""
Value = TypeVar("Value")
BYTES = 12
"""Of a digest."""


class Part(NamedTuple):
    """The share of one process in a source: of every ``of`` files, shards or rows the one with this number."""

    number: int = 0
    of: int = 1

    def has(self, place: int) -> bool:
        """Whether the value in this place, from 0, is this process's."""
        return place % self.of == self.number

    def take(self, values: Iterable[Value]) -> Iterator[Value]:
        """This process's share of the values."""
        return (value for place, value in enumerate(values) if self.has(place))


WHOLE = Part()


class Entry(NamedTuple):
    """An image of a source that has not been read yet."""

    key: str
    """Where it is: a file below the folder, a member of a shard, or a row of a dataset."""
    stamp: str
    """Another one once the image or its captions may be others: size, time and captions of a file, or size and time of
    the shard or dataset that holds it."""
    fetch: Fetch
    """To be called before the next entry is asked for."""

    @property
    def digest(self) -> str:
        """What the cache knows it by."""
        return digest(self.key, self.stamp)


def digest(*words: str) -> str:
    """A short name for these words, the same in every process."""
    return digest_of(words)


def digest_of(words: Iterable[str]) -> str:
    """``digest`` of any number of words, which are not kept in memory."""
    whole = hashlib.blake2b(digest_size=BYTES)
    for number, word in enumerate(words):
        whole.update((b"\0" if number else b"") + word.encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


@dataclass
class Digests:
    """A set of digests in 12 bytes each, 24 once it is asked; Python's own would take 150."""

    content: bytearray = field(default_factory=bytearray)

    def add(self, digest: str) -> None:
        """Take a digest; not after the first question."""
        self.content += bytes.fromhex(digest)

    def __len__(self) -> int:
        return len(self.content) // BYTES

    def __contains__(self, digest: str) -> bool:
        wanted = np.frombuffer(bytes.fromhex(digest), _NUMBERS)[0]
        place = np.searchsorted(self._sorted, wanted)
        return bool(place < len(self) and self._sorted[place] == wanted)

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.sort(np.frombuffer(bytes(self.content), _NUMBERS))


_NUMBERS = np.dtype(f"S{BYTES}")
"""numpy orders and compares byte strings of one length as it does numbers."""


def stamp(*paths: Path) -> str:
    """Sizes and times of files; "none" for one that cannot be asked."""
    stamps = []
    for path in paths:
        try:
            status = path.stat()
            stamps.append(f"{status.st_size} {status.st_mtime_ns}")
        except OSError:
            stamps.append("none")
    return ", ".join(stamps)


def missing(data: DataTable, expected: str) -> UserError:
    """The error for a ``data.path`` where nothing is, or something else."""
    what = "is a file" if data.path.is_file() else "does not exist"
    return UserError(f"data.path {data.path} {what}; expected {expected}, for data.kind = {data.kind!r}. Correct it.")
