"""The manifest: one Parquet file that says of every row what became of it.

While a job runs, what is finished goes to small files in ``manifest/``, a part every few seconds, so that a killed job
has lost nothing; at its end they become ``manifest.parquet``.
"""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace

import pyarrow as pa
from pyarrow import parquet

from batch.store import Picture, StorageError, Store

FILE, PARTS = "manifest.parquet", "manifest"
PART_EVERY = 5.0  # seconds
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the table, from 1
        ("id", pa.string()),
        ("inputs", pa.string()),  # the row itself, as JSON
        ("files", pa.list_(pa.string())),  # below the output
        ("sha256", pa.list_(pa.string())),  # of each file
        ("seconds", pa.float64()),  # from the graph's start to the last file's; null where a killed job has left none
        ("worker", pa.string()),
        ("finished", pa.float64()),  # seconds since 1970; 0 where a killed job has left no time
        ("error", pa.string()),  # null: it is done
    ]
)


@dataclass(frozen=True)
class Outcome:
    """What became of a row."""

    row: int
    id: str
    inputs: str
    files: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    seconds: float | None = None
    worker: str | None = None
    finished: float = 0.0
    error: str | None = None

    def with_pictures(self, pictures: Sequence[Picture]) -> Outcome:
        """With what the store has of it."""
        files, hashes = (picture.file for picture in pictures), (picture.sha256 for picture in pictures)
        return replace(self, files=tuple(files), sha256=tuple(hashes))


def table(outcomes: Iterable[Outcome]) -> pa.Table:
    """As rows of Arrow."""
    return pa.Table.from_pylist([asdict(one) for one in outcomes], SCHEMA)


def outcomes(found: pa.Table) -> list[Outcome]:
    """Of rows of Arrow."""
    names = [field.name for field in fields(Outcome)]
    return [
        Outcome(**{**{name: row[name] for name in names}, "files": tuple(row["files"]), "sha256": tuple(row["sha256"])})
        for row in found.to_pylist()
    ]


def read(store: Store) -> dict[str, Outcome]:
    """What is known of each row, by id; of two entries the later one. Raises StorageError."""
    known: dict[str, Outcome] = {}
    for name in [FILE, *store.names(PARTS)]:
        content = store.read(name)
        if content is not None:
            try:
                found = parquet.read_table(io.BytesIO(content), schema=SCHEMA)
            except (pa.ArrowException, OSError) as error:
                raise StorageError(
                    f"{store.shown}/{name} is damaged ({error}); expected a part of the manifest. Remove it: "
                    "pictures that only it lists are found again, errors are tried again"
                ) from error
            known |= {one.id: one for one in outcomes(found)}
    return known


def append(store: Store, new: Sequence[Outcome]) -> None:
    """Add a part. Raises StorageError."""
    if not new:
        return
    name = f"{PARTS}/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"  # sorts by time
    store.write(name, _bytes(new))


class Recorder:
    """Collects outcomes and adds a part every few seconds, and at the end of its ``with`` block."""

    def __init__(self, store: Store):
        self._store = store
        self._pending: list[Outcome] = []
        self._written = time.monotonic()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def add(self, new: Iterable[Outcome]) -> None:
        """Raises StorageError; what could not be written is tried again with what comes next."""
        self._pending += new
        if time.monotonic() - self._written >= PART_EVERY:
            self._write()

    def _write(self) -> None:
        append(self._store, self._pending)
        self._pending, self._written = [], time.monotonic()


def merge(store: Store) -> None:
    """Make one file of all parts, ordered by row. Raises StorageError; nothing is removed before it is written."""
    parts = store.names(PARTS)
    store.write(FILE, _bytes(sorted(read(store).values(), key=lambda one: one.row)))
    store.delete(parts)


def _bytes(new: Iterable[Outcome]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table(new), buffer)
    return buffer.getvalue()
