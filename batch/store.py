"""Where pictures and the manifest go: a folder, or an object store, through pyarrow's file systems."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pyarrow import ArrowInvalid, fs

from tools.harness.errors import UserError

PICTURES = "pictures"
UNFINISHED = ".unfinished-"
"""How the name of a file begins that is being written, in a folder; an object store shows no file before its end."""


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
        system, base = self._system()
        names = self._listed(fs.FileSelector(f"{base}/{_folder(row_id)}", allow_not_found=True))
        own = sorted((name for name in names if _row_of(name) == row_id), key=_number_of)
        if not own or _number_of(own[0]):
            return ()
        try:
            return tuple(
                Picture(name, hashlib.sha256(system.open_input_stream(f"{base}/{name}").readall()).hexdigest())
                for name in own
            )
        except OSError as error:
            raise self._failed("read", error) from error

    def rows(self) -> Iterator[str]:
        """Ids of the rows that are done, that is whose first file is there. Raises StorageError."""
        _, base = self._system()
        selector = fs.FileSelector(f"{base}/{PICTURES}", allow_not_found=True, recursive=True)
        return (_row_of(name) for name in self._listed(selector) if not _number_of(name))

    def names(self, folder: str) -> list[str]:
        """Paths of the finished files in a folder of the output, sorted. Raises StorageError."""
        _, base = self._system()
        return sorted(self._listed(fs.FileSelector(f"{base}/{folder}", allow_not_found=True)))

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file. Raises StorageError."""
        system, base = self._system()
        try:
            if system.get_file_info(f"{base}/{name}").type != fs.FileType.File:
                return None
            with system.open_input_stream(f"{base}/{name}") as stream:
                return bytes(stream.readall())
        except OSError as error:
            raise self._failed("read", error) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, in the place of one that may be there. Raises StorageError."""
        system, base = self._system()
        path = PurePosixPath(base, name)
        local = isinstance(system, fs.LocalFileSystem)
        target = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}") if local else path
        try:
            if local:
                system.create_dir(str(path.parent))
            with system.open_output_stream(str(target)) as stream:
                stream.write(content)
            if local:
                Path(target).replace(path)
        except OSError as error:
            if local:
                Path(target).unlink(missing_ok=True)
            raise self._failed("written", error) from error

    def delete(self, names: list[str]) -> None:
        """Remove files. Raises StorageError."""
        system, base = self._system()
        try:
            for name in names:
                system.delete_file(f"{base}/{name}")
        except OSError as error:
            raise self._failed("changed", error) from error

    def clear(self) -> None:
        """Remove what killed processes of this machine's folder left half written. Raises StorageError."""
        system, base = self._system()
        if isinstance(system, fs.LocalFileSystem):
            for path in Path(base).rglob(f"{UNFINISHED}*"):
                path.unlink(missing_ok=True)

    def local(self) -> Path | None:
        """The folder, if it is one of this machine."""
        system, base = self._system()
        return Path(base) if isinstance(system, fs.LocalFileSystem) else None

    def _system(self) -> tuple[fs.FileSystem, str]:
        return open_location(self.location)

    def _listed(self, selector: fs.FileSelector) -> Iterator[str]:
        system, base = self._system()
        try:
            found = system.get_file_info(selector)
        except OSError as error:
            raise self._failed("listed", error) from error
        for info in found:
            if info.type == fs.FileType.File and not info.base_name.startswith(UNFINISHED):
                yield str(PurePosixPath(info.path).relative_to(base))

    def _failed(self, what: str, error: OSError) -> StorageError:
        return StorageError(f"{self.location} cannot be {what} now ({error.strerror or error})")


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it. Raises UserError for what is neither."""
    try:
        if "://" not in location:
            return fs.LocalFileSystem(), str(Path(location).absolute())
        return fs.FileSystem.from_uri(location)
    except (ArrowInvalid, OSError, ValueError) as error:
        raise UserError(
            f"{location}: no place to write to ({error}). Expected a folder, or a URI such as s3://bucket/folder or "
            "gs://bucket/folder."
        ) from error


def _folder(row_id: str) -> str:
    return f"{PICTURES}/{row_id[:2]}"  # a folder with a hundred thousand files is slow to open


def _name(row_id: str, number: int, suffix: str) -> str:
    return f"{_folder(row_id)}/{row_id}{f'-{number:03d}' if number else ''}{suffix}"


def _row_of(name: str) -> str:
    return PurePosixPath(name).name.split(".")[0].split("-")[0]


def _number_of(name: str) -> int:
    number = PurePosixPath(name).name.split(".")[0].partition("-")[2]
    return int(number) if number else 0
