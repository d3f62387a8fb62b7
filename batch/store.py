"""Where pictures and the manifest go: a folder, or an object store, through pyarrow's file systems."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pyarrow import ArrowException, ArrowInvalid, fs

from tools.harness.errors import UserError

T = TypeVar("T")
PICTURES = "pictures"
NAME = re.compile(r"(?P<row>[0-9a-f]{24})(?:-(?P<number>[0-9]{3}))?(?:\.[A-Za-z0-9]+)?")
"""Of a picture: its row's id; the first one of a row has no number."""
LOCK = ".batch.lock"
"""In a folder that a job writes to."""
UNFINISHED = ".unfinished-"
"""How the name of a file begins that is being written, in a folder; an object store shows no file before its end."""
WAITS = (1.0, 5.0, 25.0)
"""Seconds before each new try of a write: networks come back."""


class StorageError(Exception):
    """The output cannot be written or read now: disk full, network gone. Nothing is wrong with the row at hand."""


@dataclass(frozen=True)
class File:
    """One file that a graph has given out; the suffix has its dot."""

    suffix: str
    content: bytes


@dataclass(frozen=True)
class Picture:
    """One file that a row gave: its path below the output, and its bytes' hash."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Store:
    """The output, as text, so that it reaches other processes: a path of this machine, or a URI (s3://, gs://)."""

    location: str

    @property
    def shown(self) -> str:
        """The location for people: a URI may have a password in it."""
        scheme, is_uri, rest = self.location.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if is_uri else self.location

    def save(self, row_id: str, files: Sequence[File]) -> tuple[Picture, ...]:
        """Write a row's files, the first one last, so that it vouches for all.

        Raises StorageError; what was written until then is written over by the next attempt.
        """
        names = [_name(row_id, number, file.suffix) for number, file in enumerate(files)]
        for name, file in reversed(list(zip(names, files, strict=True))):
            self.write(name, file.content)
        hashes = (hashlib.sha256(file.content).hexdigest() for file in files)
        return tuple(map(Picture, names, hashes))

    def find(self, row_id: str) -> tuple[Picture, ...]:
        """A row's files, read again for their hashes; empty if the row is not done. Raises StorageError."""
        found = {number: name for name in self.names(_folder(row_id)) for number in _numbers(name, row_id)}
        if 0 not in found:
            return ()
        contents = [(found[number], self.read(found[number])) for number in sorted(found)]
        return tuple(Picture(name, hashlib.sha256(content).hexdigest()) for name, content in contents if content)

    def rows(self) -> Iterator[str]:
        """Ids of the rows that are done, that is whose first file is there and not empty. Raises StorageError."""
        for name in self._listed(PICTURES, recursive=True):
            parsed = NAME.fullmatch(PurePosixPath(name).name)
            if parsed and parsed["number"] is None:
                yield parsed["row"]

    def names(self, folder: str) -> list[str]:
        """Paths of the finished files in a folder of the output, sorted. Raises StorageError."""
        return sorted(self._listed(folder, recursive=False))

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file. Raises StorageError."""

        def content(system: fs.FileSystem, base: str) -> bytes | None:
            if system.get_file_info(f"{base}/{name}").type != fs.FileType.File:
                return None
            with system.open_input_stream(f"{base}/{name}") as stream:
                return bytes(stream.readall())

        return self._tried("read", content)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, in the place of one that may be there; in several tries.

        Raises StorageError.
        """
        for wait in (*WAITS, None):
            try:
                return self._tried("written", functools.partial(_write, name, content))
            except StorageError:
                if wait is None:
                    raise
                time.sleep(wait)

    def delete(self, names: Sequence[str]) -> None:
        """Remove files. Raises StorageError."""

        def work(system: fs.FileSystem, base: str) -> None:
            for name in names:
                system.delete_file(f"{base}/{name}")

        self._tried("changed", work)

    def clear(self) -> None:
        """Remove what killed processes have left half written in a folder of this machine. Raises StorageError."""
        if folder := self.local():
            places = [folder, *(folder / PICTURES).glob("*"), folder / "manifest"]
            with suppress(OSError):  # they are in nobody's way
                for path in (path for place in places for path in place.glob(f"{UNFINISHED}*")):
                    path.unlink()

    def local(self) -> Path | None:
        """The folder, if it is one of this machine. Raises StorageError."""
        return self._tried("reached", lambda system, base: Path(base) if _is_local(system) else None)

    def _listed(self, folder: str, recursive: bool) -> list[str]:
        def names(system: fs.FileSystem, base: str) -> list[str]:
            selector = fs.FileSelector(f"{base}/{folder}", allow_not_found=True, recursive=recursive)
            files = [info for info in system.get_file_info(selector) if info.type == fs.FileType.File and info.size]
            paths = [PurePosixPath(info.path).relative_to(base) for info in files]
            return [str(path) for path in paths if not path.name.startswith(UNFINISHED)]

        return self._tried("listed", names)

    def _tried(self, what: str, work: Callable[[fs.FileSystem, str], T]) -> T:
        try:
            return work(*open_location(self.location))
        except (OSError, ArrowException) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"{self.shown} cannot be {what} now ({reason})") from error


@functools.cache
def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it. Raises UserError for what is neither, OSError."""
    if "://" not in location:
        return fs.LocalFileSystem(), Path(location).absolute().as_posix()
    try:
        system, base = fs.FileSystem.from_uri(location)
    except (ArrowInvalid, ValueError) as error:
        raise UserError(
            f"{Store(location).shown}: no place to write to ({error}). Expected a folder, or a URI such as "
            "s3://bucket/folder or gs://bucket/folder."
        ) from error
    return system, base.rstrip("/")


def _is_local(system: fs.FileSystem) -> bool:
    return isinstance(system, fs.LocalFileSystem)


def _write(name: str, content: bytes, system: fs.FileSystem, base: str) -> None:
    path = f"{base}/{name}"
    if not _is_local(system):
        with system.open_output_stream(path) as stream:
            stream.write(content)
        return
    target = Path(path)
    beside = target.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def _folder(row_id: str) -> str:
    return f"{PICTURES}/{row_id[:2]}"  # a folder with a hundred thousand files is slow to open


def _name(row_id: str, number: int, suffix: str) -> str:
    return f"{_folder(row_id)}/{row_id}{f'-{number:03d}' if number else ''}{suffix}"


def _numbers(name: str, row_id: str) -> list[int]:
    """The number of a row's file; none of another's."""
    parsed = NAME.fullmatch(PurePosixPath(name).name)
    return [int(parsed["number"] or 0)] if parsed and parsed["row"] == row_id else []
