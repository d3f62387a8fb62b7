"""Captions of image files in a folder: text files beside them, or tables as Hugging Face's imagefolder reads them."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .config import DataTable
from .errors import UserError
from .images import Unusable

TEXTS = (".txt", ".caption")
"""Extensions of captions beside an image; the first that is there counts."""
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
Report = Callable[[str], None]


class FolderCaptions:
    """The captions of ``data.path``. A table is read once, when an image asks for it."""

    def __init__(self, data: DataTable, report: Report) -> None:
        self.data, self.report = data, report
        self._tables = dict[Path, dict[str, Any]]()

    def of(self, image: Path) -> tuple[Any, str]:
        """What stands for an image, not yet checked, and where; bytes of a text file, a value of a table, or None.

        A table may lie in the image's folder or any above it, up to ``data.path``; the nearest with a row for the image
        counts. Raises OSError where a text file cannot be read.
        """
        for suffix in TEXTS:
            if (beside := image.with_suffix(suffix)).is_file():
                return beside.read_bytes(), beside.name
        for folder in image.parents:
            name = image.relative_to(folder).as_posix()
            if name in (table := self._table(folder)):
                return table[name], f"{self.data.caption} in {table['']}"
            if folder == self.data.path:
                break
        texts = " or ".join(f"{image.stem}{suffix}" for suffix in TEXTS)
        return None, f"neither in {texts} nor in {', '.join(TABLES[:-1])} or {TABLES[-1]}"

    def _table(self, folder: Path) -> dict[str, Any]:
        """File name below the folder -> caption as given there; '' -> the table's own name."""
        if folder not in self._tables:
            self._tables[folder] = self._read(folder)
        return self._tables[folder]

    def _read(self, folder: Path) -> dict[str, Any]:
        path = next((path for name in TABLES if (path := folder / name).is_file()), None)
        if path is None:
            return {}
        captions, column = {"": path.name}, self.data.caption
        for where, row in READERS[path.suffix](path):
            try:
                name = row.get("file_name") or row[f"{self.data.image}_file_name"]
                captions[posixpath.normpath(name.replace("\\", "/"))] = row.get(column, row.get("text"))
            except (KeyError, TypeError, AttributeError):
                table = path.relative_to(self.data.path).as_posix()
                self.report(f"{table}, {where}: this is not {ROWS[path.suffix]} with a file_name; skipped")
        return captions


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError:
                yield f"line {number}", None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(path.read_text("utf-8-sig", "replace"), newline=""))
    yield from ((f"line {reader.line_num}", row) for row in reader)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow, which is not installed; expected it for tables in this format. Install "
            f"koala-distill[huggingface], or convert the table to metadata.jsonl."
        ) from None
    yield from ((f"row {number}", row) for number, row in enumerate(parquet.read_table(path).to_pylist()))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
ROWS = {".jsonl": "a JSON object", ".csv": "a row", ".parquet": "a row"}


def text(content: bytes, where: str) -> str:
    """A text file's caption, in UTF-8 with or without a byte order mark. Raises Unusable for none."""
    try:
        return caption(content.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        raise Unusable(f"the caption in {where} is not UTF-8 text") from None


def caption(found: Any, where: str) -> str:
    """A caption without surrounding whitespace. Raises Unusable for none, or for what is not text."""
    if not isinstance(found, str | None):
        raise Unusable(f"the caption ({where}) is {type(found).__name__}, not text")
    if not (found and found.strip()):
        raise Unusable(f"there is no caption ({where} is missing or empty)")
    return found.strip()
