"""Captions of image files in a folder: text files beside them, or tables as Hugging Face's imagefolder reads them."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
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
                return table[name], f"{' or '.join(self.data.caption)} in {table['']}"
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
        found: dict[str, Any] = {"": path.name}
        for where, row in READERS[path.suffix](path):
            try:
                name = row.get("file_name") or row[f"{self.data.image}_file_name"]
                found[posixpath.normpath(name.replace("\\", "/"))] = of_row(row, self.data.caption, "text")
            except (KeyError, TypeError, AttributeError):
                table = path.relative_to(self.data.path).as_posix()
                self.report(f"{table}, {where}: this is not {ROWS[path.suffix]} with a file_name; skipped")
        return found


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
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
    batches = parquet.ParquetFile(path).iter_batches()
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from ((f"row {number}", row) for number, row in enumerate(rows))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
ROWS = {".jsonl": "a JSON object", ".csv": "a row", ".parquet": "a row"}


def lines_of(content: bytes, where: str, each_line: bool) -> str | list[str]:
    """A text file's caption, or each of its lines as one; UTF-8 with or without a byte order mark. Raises Unusable."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unusable(f"the caption in {where} is not UTF-8 text") from None
    return text.splitlines() if each_line else text


def of_row(row: Mapping[str, Any], names: Sequence[str], otherwise: str = "") -> Any:
    """What a row has under these names, not yet checked; of several all that it has, as a list. Where it has none of
    these keys, what it has under ``otherwise``."""
    found = [row[name] for name in names if name in row] or [row.get(otherwise)]
    lists = [value if isinstance(value, list) else [value] for value in found]
    return found[0] if len(found) == 1 else [one for values in lists for one in values]


def captions(found: Any, where: str) -> tuple[str, ...]:
    """One caption or a list of them, without surrounding whitespace and without empty ones. Raises Unusable for none,
    or for what is not text."""
    given = found if isinstance(found, list) else [found]
    if wrong := [one for one in given if not isinstance(one, str | None)]:
        raise Unusable(f"the caption ({where}) is {type(wrong[0]).__name__}, not text")
    words = tuple(one.strip() for one in given if one and one.strip())
    if not words:
        raise Unusable(f"there is no caption ({where} is missing or empty)")
    return words
