"""Images with captions, one at a time: from a folder, WebDataset shards or a Hugging Face dataset on disk.

What cannot be used is reported and skipped; only a source without a single usable image is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from . import folder, tars
from .captions import Report, captions, of_row
from .config import DataTable
from .entries import WHOLE, Entry, Part, digest, digest_of, missing, stamp
from .errors import UserError
from .images import Unusable, decode, first_line, jpeg_quality


@dataclass(frozen=True)
class Sample:
    """An image with its caption."""

    key: str
    digest: str
    """``Entry.key`` and ``Entry.digest``."""
    image: Image.Image
    """RGB, in its intended orientation."""
    captions: tuple[str, ...]
    """One or more, none of them empty."""
    jpeg: int
    """``jpeg_quality`` of its file."""


def read(
    data: DataTable, report: Report, part: Part = WHOLE, wanted: Callable[[Entry], bool] = lambda entry: True
) -> Iterator[Sample]:
    """Read every usable image of a part that is ``wanted``, always in the same order.

    ``report`` receives a line for each image or shard that is skipped. Raises UserError where the source does not
    exist, is something else, or, to a single process, contains nothing usable; the last is known only at its end.
    """
    usable, faults, first = 0, 0, ""

    def skip(line: str) -> None:
        nonlocal faults, first
        faults, first = faults + 1, first or line
        report(line)

    for entry in SOURCES[data.kind](data, skip, part):
        if not wanted(entry):
            usable += 1
            continue
        try:
            content, words = entry.fetch()
            sample = Sample(entry.key, entry.digest, decode(content), words, jpeg_quality(content))
        except Unusable as fault:
            skip(f"{entry.key}: {fault}; skipped")
        else:
            usable += 1
            yield sample
    if not usable and part.of == 1:
        why = f"{faults} entries were skipped (first: {first})" if faults else "it is empty"
        raise UserError(
            f"{data.path} has no usable image with a caption: {why}. Expected at least one; repair the data, or "
            f"correct data.path, data.image or data.caption."
        )


def listing(data: DataTable) -> str:
    """A digest of everything that the source holds, by names, sizes, times and, in a folder, captions: another one once
    any of it is another. No image is read. Raises UserError as ``read`` does."""
    return digest_of(LISTINGS[data.kind](data))


def is_gone(data: DataTable) -> bool:
    """Whether nothing is left at ``data.path``, such as after the images were cached elsewhere."""
    if data.kind == "webdataset" and "{" in data.path.as_posix():
        return not any(path.exists() for _, path in tars.named_shards(data))
    return not data.path.exists()


# --- Hugging Face ------------------------------------------------------------------------------------------------


def _huggingface(data: DataTable, report: Report, part: Part) -> Iterator[Entry]:
    import datasets  # takes seconds, needed by this kind only

    if not data.path.is_dir():
        raise missing(data, "a folder to which a Hugging Face dataset was saved")
    try:
        found = datasets.load_from_disk(str(data.path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{data.path} is not a readable Hugging Face dataset ({first_line(error)}); expected what "
            f"Dataset.save_to_disk writes. Correct data.path, or data.kind if this is another kind."
        ) from None
    if isinstance(found, datasets.DatasetDict):
        raise UserError(
            f"{data.path} holds several datasets ({', '.join(found)}); expected a single one. Give one of its "
            f"subfolders as data.path."
        )
    for key, column in (("data.image", data.image), *(("data.caption", column) for column in data.caption)):
        if column not in found.column_names:
            raise UserError(
                f"{data.path} has no column {column!r}; it has {', '.join(found.column_names)}. Set {key} to one of "
                f"these."
            )
    try:
        rows = found.select_columns([data.image, *data.caption]).cast_column(data.image, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"column {data.image!r} of {data.path} holds no images ({first_line(error)}); expected images, or the "
            f"bytes of image files. Set data.image to another of {', '.join(found.column_names)}."
        ) from None
    own = digest(*_dataset_files(data))
    for number in part.take(range(len(rows))):
        yield Entry(f"{data.path.name}, row {number}", own, partial(_fetch_row, data, rows, number))


def _dataset_files(data: DataTable) -> Iterator[str]:
    """The files of which a dataset says that it consists; any others are caches of the library."""
    if not data.path.is_dir():
        raise missing(data, "a folder to which a Hugging Face dataset was saved")
    state = data.path / "state.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        names = [file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
        return (f"{path.name} {stamp(path)}" for path in (state, *(data.path / name for name in names)))
    return iter(())  # not such a dataset, which ``read`` says


def _fetch_row(data: DataTable, rows: Any, number: int) -> tuple[bytes, tuple[str, ...]]:
    row = rows[number]
    words = captions(of_row(row, data.caption), f"column {' or '.join(data.caption)}")
    image = row[data.image] or {}
    if image.get("bytes") is not None:
        return image["bytes"], words
    if not image.get("path"):
        raise Unusable(f"there is no image in column {data.image}")
    try:
        return Path(image["path"]).read_bytes(), words
    except OSError as error:
        raise Unusable(f"{image['path']} cannot be read ({error.strerror})") from None


SOURCES: Mapping[str, Callable[[DataTable, Report, Part], Iterator[Entry]]] = {
    "folder": folder.entries,
    "webdataset": tars.entries,
    "huggingface": _huggingface,
}
LISTINGS: Mapping[str, Callable[[DataTable], Iterator[str]]] = {
    "folder": lambda data: (entry.digest for entry in folder.entries(data, lambda _: None, WHOLE)),
    "webdataset": lambda data: (f"{name} {stamp(path)}" for name, path in tars.named_shards(data)),
    "huggingface": _dataset_files,
}
