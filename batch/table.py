"""Tables of settings: a CSV, JSONL or Parquet file, or what ``--grid`` spells out."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.harness.errors import UserError

Value = str | int | float | bool | None
"""A cell. None: the file has no value there, and the workflow keeps its own."""

MAX_ROWS = 10_000_000
"""More rows than this come from a slip in a range, and would fill the memory before anything is said."""
NUMBER = r"[+-]?\d+(?:\.\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(?:\.\.({NUMBER}))?")


@dataclass(frozen=True)
class Table:
    """Rows of cells, one cell for each column. ``source`` is how errors name it: a file's name, or "--grid"."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


def read(path: Path) -> Table:
    """The table in a file, read by its suffix. In CSV every value is text; JSONL and Parquet keep types.

    Whole numbers stay exact, whatever their size. Rows are counted from 1, without header and blank lines. Raises
    UserError in one line if the file is missing, damaged, empty, or has a column or a value that no input can take.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: the suffix is {path.suffix or 'missing'!r}, expected one of {', '.join(READERS)}")
    try:
        columns, rows = reader(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such table; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the text is not UTF-8 (byte {error.start}); save the table as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: the table cannot be read: {error.strerror or _line(error)}") from error
    _check_columns(path.name, columns)
    if not rows:
        raise UserError(f"{path}: the table has no rows, only {len(columns)} columns; add a row for each image")
    return Table(path.name, tuple(columns), tuple(rows))


def grid(definitions: Sequence[str]) -> Table:
    """The table of every combination of ``name=values``, in the order given: the last name varies fastest.

    Values are separated by commas and quoted as in CSV; ``0..9`` and ``0..100..25`` are whole numbers with both ends,
    the latter in steps. A value is a number or true/false where it is spelled as one, else text. Raises UserError for
    a definition that is none, a name given twice, or more than ``MAX_ROWS`` combinations.
    """
    names, values = zip(*map(_definition, definitions), strict=True) if definitions else ((), ())
    _check_columns("--grid", names)
    _check_size("--grid", math.prod(map(len, values)))
    return Table("--grid", names, tuple(itertools.product(*values)))


def crossed(table: Table, by: Table) -> Table:
    """Every row of a table with every row of another, whose rows vary fastest. Raises UserError for a common column."""
    source = f"{table.source} with {by.source}"
    if both := [name for name in table.columns if name in by.columns]:
        raise UserError(f"{source}: both have the column {', '.join(map(repr, both))}; leave it out of one of them")
    _check_size(source, len(table.rows) * len(by.rows))
    rows = (one + other for one, other in itertools.product(table.rows, by.rows))
    return Table(source, table.columns + by.columns, tuple(rows))


Read = tuple[Sequence[str], list[tuple[Value, ...]]]


def _read_csv(path: Path, separator: str = ",") -> Read:
    rows: list[tuple[Value, ...]] = []
    columns: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = (line for line in csv.reader(file, delimiter=separator, strict=True) if line)
        try:
            columns = [name.strip() for name in next(lines, ())]
            for number, line in enumerate(lines, 1):
                if len(line) != len(columns):
                    raise UserError(
                        f"{path}, row {number}: {len(line)} cells, expected {len(columns)} as in the header; "
                        'put a value that has a comma or a line break into "quotes"'
                    )
                rows.append(tuple(line))
        except csv.Error as error:
            place = f"row {len(rows) + 1}" if columns else "header"
            raise UserError(f"{path}, {place}: not well-formed CSV: {error}; check the quotes") from error
    if len(columns) == 1 and ";" in columns[0]:
        raise UserError(f"{path}: the columns are separated by ';', expected ','; save the table with commas")
    return columns, rows


def _read_tsv(path: Path) -> Read:
    return _read_csv(path, "\t")


def _read_jsonl(path: Path) -> Read:
    with path.open(encoding="utf-8-sig") as file:  # not splitlines(), which also splits at rare marks inside a text
        lines = [line for line in file if line.strip()]
    rows = [_json_row(f"{path}, row {number}", line) for number, line in enumerate(lines, 1)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [tuple(row.get(name) for name in columns) for row in rows]


def _json_row(where: str, line: str) -> dict[str, Value]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := _repeated(name for name, _ in pairs):
            raise UserError(f"{where}: the key {twice!r} is there twice; keep one")
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: not JSON ({error}); expected an object such as {{"seed": 7}}') from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: a JSON {type(row).__name__}, expected an object such as {{"seed": 7}}')
    for name, value in row.items():
        if isinstance(value, list | dict):
            raise UserError(
                f"{where}: {name!r} is nested ({type(value).__name__}), expected text, a number or true/false"
            )
    return row


def _read_parquet(path: Path) -> Read:
    import pyarrow as pa
    from pyarrow import parquet, types

    if path.is_dir():
        raise IsADirectoryError(0, "it is a folder, expected one file")
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file).read()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file, or a damaged one ({_line(error)})") from error
    cells = []
    for field, column in zip(table.schema, table.columns, strict=True):
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
        if not any(test(kind) for test in (*plain, types.is_null)):
            raise UserError(
                f"{path}: column {field.name!r} has the type {field.type}, expected text, numbers or true/false"
            )
        cells.append(column.to_pylist())
    return table.column_names, list(zip(*cells, strict=True))


READERS: dict[str, Callable[[Path], Read]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _definition(text: str) -> tuple[str, tuple[Value, ...]]:
    """Name and values of one ``name=values``."""
    where = f"--grid {' '.join(text.split())}"
    name, equals, values = text.partition("=")
    name = name.strip()
    if not (name and equals and values.strip()):
        raise UserError(f"{where}: expected name=values, such as seed=0..9 or cfg=4,7.5")
    try:
        (items,) = csv.reader([values], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise UserError(f'{where}: expected values on one line, each as it is or in "quotes"') from error
    found = tuple(itertools.chain.from_iterable(_item(where, item.strip()) for item in items))
    if "" in found and not all(isinstance(value, str) for value in found):
        raise UserError(f"{where}: a value between two commas is missing")
    return name, found


def _item(where: str, item: str) -> Iterable[Value]:
    """The values of one item of a list: itself, or those of a range."""
    match = RANGE.fullmatch(item)
    if match is None:
        return (_typed(item),)
    if "." in "".join(part or "" for part in match.groups()):
        raise UserError(f"{where}: a range has whole numbers; list other values, as in cfg=4,4.5,5")
    first, last, step = (int(part) if part else 1 for part in match.groups())
    if step < 1 or last < first:
        raise UserError(f"{where}: a range goes up, in steps of 1 or more: the smaller number first, as in 0..9")
    _check_size(where, (last - first) // step + 1)
    return range(first, last + 1, step)


def _typed(item: str) -> Value:
    """A number or a truth value, if it is spelled as one would be written out again; else the text as it is."""
    if item.lower() in ("true", "false"):
        return item.lower() == "true"
    for kind in (int, float):
        try:
            value: int | float = kind(item)
        except ValueError:
            continue
        if str(value) == item and math.isfinite(value):
            return value
    return item


def _check_columns(source: str, columns: Sequence[str]) -> None:
    if not columns:
        raise UserError(f"{source}: the table is empty; expected a column for each input and a row for each image")
    if "" in (name.strip() for name in columns):
        position = [name.strip() for name in columns].index("") + 1
        raise UserError(f"{source}: column {position} has no name; name the input that it sets, such as prompt or seed")
    if twice := _repeated(columns):
        raise UserError(f"{source}: the column {twice!r} is there twice; keep one")


def _check_size(source: str, rows: int) -> None:
    if rows > MAX_ROWS:
        raise UserError(f"{source}: {rows} rows, expected at most {MAX_ROWS}; give smaller ranges")


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _line(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return " ".join(str(error).split())
