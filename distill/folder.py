"""A folder of image files as a source: read folder by folder, in the order of the names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .captions import TABLES, TEXTS, FolderCaptions, Report, captions, lines_of
from .config import DataTable
from .entries import Entry, Part, missing, stamp
from .errors import UserError
from .images import EXTENSIONS, LISTED, Unusable


def entries(data: DataTable, report: Report, part: Part) -> Iterator[Entry]:
    """The images of one part, sorted by path. Only one folder's names are in memory at a time."""
    if not data.path.is_dir():
        raise missing(data, f"a folder with images ({LISTED})")
    found, others, number = FolderCaptions(data, report), _Others(data.path), 0
    for number, file in enumerate(_images(data.path, others, report), 1):
        if part.has(number - 1):
            yield _entry(data, file, found)
    if not number:
        raise UserError(
            f"{data.path} contains no images, nor do its subfolders; expected {LISTED}, with captions beside them. "
            f"Correct data.path, or data.kind if these are WebDataset shards or a Hugging Face dataset."
        )
    if part.number == 0:
        others.report_to(report)


@dataclass
class _Others:
    """The files that are not read, counted by extension, with the first of each."""

    root: Path
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, Path] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        self.counts[path.suffix.lower()] += 1
        self.first.setdefault(path.suffix.lower(), path)

    def report_to(self, report: Report) -> None:
        for suffix, count in sorted(self.counts.items()):
            why = "the caption of no image" if suffix in TEXTS else "no image that Pillow reads"
            name = self.first[suffix].relative_to(self.root).as_posix()
            report(f"not read: {count} {suffix or 'without extension'}, such as {name} ({why}); skipped")


def _images(folder: Path, others: _Others, report: Report) -> Iterator[Path]:
    """The image files in a folder and below it, as ``sorted`` orders their paths; links to folders are not followed."""
    try:
        with os.scandir(folder) as scanned:
            found = sorted((one.name, one.is_dir(follow_symlinks=False), one.is_file()) for one in scanned)
    except OSError as error:
        report(f"{folder.relative_to(others.root).as_posix()}: the folder cannot be read ({error.strerror}); skipped")
        return
    owners = {path.stem for name, _, is_file in found if is_file and _is_image(path := Path(name))}
    for name, is_folder, is_file in found:
        path = folder / name
        if is_folder:
            yield from _images(path, others, report)
        elif is_file and _is_image(path):
            yield path
        elif is_file and not (
            name.startswith(".") or name in TABLES or (path.suffix.lower() in TEXTS and path.stem in owners)
        ):
            others.add(path)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _entry(data: DataTable, file: Path, found: FolderCaptions) -> Entry:
    key = file.relative_to(data.path).as_posix()
    try:
        given, where = found.of(file)
    except OSError as error:
        return Entry(key, "unreadable caption", partial(_unreadable, error))
    return Entry(key, f"{stamp(file)}, {given!r}", partial(_fetch, data, file, given, where))


def _unreadable(error: OSError) -> tuple[bytes, tuple[str, ...]]:
    raise Unusable(f"its caption cannot be read ({error.strerror})")


def _fetch(data: DataTable, file: Path, given: Any, where: str) -> tuple[bytes, tuple[str, ...]]:
    if given is None and where.startswith("neither"):
        raise Unusable(f"there is no caption, {where}")
    words = captions(lines_of(given, where, data.caption_lines) if isinstance(given, bytes) else given, where)
    try:
        return file.read_bytes(), words
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from None
