"""Images with captions, one at a time: from a folder, WebDataset shards or a Hugging Face dataset on disk.

What cannot be used is reported and skipped; only a source without a single usable image is an error.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from .captions import TABLES, TEXTS, FolderCaptions, Report, caption, text
from .config import DataTable
from .errors import UserError
from .images import EXTENSIONS, LISTED, Unusable, decode, first_line, jpeg_quality

Fetch = Callable[[], tuple[bytes, str]]
"""Returns an image's file content and its caption; raises Unusable where either is missing."""


class Part(NamedTuple):
    """The share of one process in a source: of every ``of`` files, shards or rows the one with this number."""

    number: int = 0
    of: int = 1

    def take(self, values: Iterable[Any]) -> Iterator[Any]:
        """This process's share of the values."""
        return (value for place, value in enumerate(values) if place % self.of == self.number)


WHOLE = Part()


class Entry(NamedTuple):
    """An image of a source that has not been read yet."""

    key: str
    """Where it is: a file below the folder, a member of a shard, or a row of a dataset."""
    stamp: str
    """Another one once the image or its caption may be another: size, time and caption of a file, or size and time of
    the shard or dataset that holds it."""
    fetch: Fetch

    @property
    def digest(self) -> str:
        """What the cache knows it by."""
        return digest(self.key, self.stamp)


@dataclass(frozen=True)
class Sample:
    """An image with its caption."""

    key: str
    digest: str
    """``Entry.key`` and ``Entry.digest``."""
    image: Image.Image
    """RGB, in its intended orientation."""
    caption: str
    """Not empty."""
    jpeg: int
    """``jpeg_quality`` of its file."""


def digest(*words: str) -> str:
    """A short name for these words, the same in every process."""
    return hashlib.blake2b("\0".join(words).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


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
    return digest(*LISTINGS[data.kind](data))


def is_gone(data: DataTable) -> bool:
    """Whether nothing is left at ``data.path``, such as after the images were cached elsewhere."""
    if data.kind == "webdataset" and "{" in data.path.as_posix():
        return not any(path.exists() for path in _shards(data))
    return not data.path.exists()


def _stamp(*paths: Path) -> str:
    """Sizes and times of files; "none" for one that cannot be asked."""
    stamps = []
    for path in paths:
        try:
            status = path.stat()
            stamps.append(f"{status.st_size} {status.st_mtime_ns}")
        except OSError:
            stamps.append("none")
    return ", ".join(stamps)


# --- a folder ----------------------------------------------------------------------------------------------------


def _folder(data: DataTable, report: Report, part: Part) -> Iterator[Entry]:
    if not data.path.is_dir():
        raise _missing(data, f"a folder with images ({LISTED})")
    files = sorted(path for path in data.path.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    if not images:
        raise UserError(
            f"{data.path} contains no images, nor do its subfolders; expected {LISTED}, with captions beside them. "
            f"Correct data.path, or data.kind if these are WebDataset shards or a Hugging Face dataset."
        )
    captions = FolderCaptions(data, report)
    for file in part.take(images):
        yield _file(data, file, captions)
    if part.number == 0:
        _report_others(data, files, images, report)


def _file(data: DataTable, file: Path, captions: FolderCaptions) -> Entry:
    key = file.relative_to(data.path).as_posix()
    try:
        found, where = captions.of(file)
    except OSError as error:
        return Entry(key, "unreadable caption", partial(_unreadable, error))
    return Entry(key, f"{_stamp(file)}, {found!r}", partial(_fetch_file, file, found, where))


def _unreadable(error: OSError) -> tuple[bytes, str]:
    raise Unusable(f"its caption cannot be read ({error.strerror})")


def _fetch_file(file: Path, found: Any, where: str) -> tuple[bytes, str]:
    if found is None and where.startswith("neither"):
        raise Unusable(f"there is no caption, {where}")
    words = text(found, where) if isinstance(found, bytes) else caption(found, where)
    try:
        return file.read_bytes(), words
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from None


def _report_others(data: DataTable, files: Iterable[Path], images: Iterable[Path], report: Report) -> None:
    """A line for each kind of file that is not read, with the number of such files and the first of them."""
    owners = {path.with_suffix("") for path in images}
    counts, first = Counter[str](), dict[str, Path]()
    for path in files:
        suffix = path.suffix.lower()
        used = suffix in EXTENSIONS or path.name in TABLES or (suffix in TEXTS and path.with_suffix("") in owners)
        if not used and not path.name.startswith("."):
            counts[suffix] += 1
            first.setdefault(suffix, path)
    for suffix, count in sorted(counts.items()):
        why = "the caption of no image" if suffix in TEXTS else "no image that Pillow reads"
        name = first[suffix].relative_to(data.path).as_posix()
        report(f"not read: {count} {suffix or 'without extension'}, such as {name} ({why}); skipped")


# --- WebDataset --------------------------------------------------------------------------------------------------


def _webdataset(data: DataTable, report: Report, part: Part) -> Iterator[Entry]:
    for shard in part.take(_shards(data)):
        stamp = _stamp(shard)
        for members in _members(shard, report):
            suffix = next((suffix for suffix in EXTENSIONS if suffix[1:] in members), "")
            key = f"{shard.name}/{members['__key__']}{suffix}"
            yield Entry(key, stamp, partial(_fetch_members, data, members, suffix[1:]))


def _shards(data: DataTable) -> list[Path]:
    """The shards that ``data.path`` names; those of a pattern need not exist."""
    from braceexpand import braceexpand  # WebDataset's own

    if data.path.is_dir():
        shards = sorted(data.path.glob("*.tar"))
        if not shards:
            raise UserError(
                f"{data.path} contains no .tar files; expected WebDataset shards. Correct data.path, or data.kind if "
                f"this is a folder of images or a Hugging Face dataset."
            )
        return shards
    if data.path.is_file():
        return [data.path]
    try:
        shards = [Path(name) for name in braceexpand(data.path.as_posix(), escape=False)]
    except ValueError:
        raise UserError(
            f"data.path {data.path} has unbalanced braces; expected a pattern such as shards/{{000..031}}.tar. "
            f"Correct it."
        ) from None
    if len(shards) == 1:
        raise _missing(data, "a folder with .tar files, one such file, or a pattern such as shards/{000..031}.tar")
    return shards


def _members(shard: Path, report: Report) -> Iterator[Mapping[str, Any]]:
    """A shard's samples as WebDataset groups them: ``__key__``, and content by lower-case extension without the dot.

    Where the shard is damaged, that is reported and its rest skipped. A truncated member is left out, so that the last
    sample may lack one.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander  # takes seconds, needed by this kind only

    broken = False

    def stop(error: Exception) -> bool:
        nonlocal broken
        if not broken:  # closing the archive may fail again
            report(f"{shard.name}: the shard is damaged ({first_line(error)}); the rest is skipped")
        broken = True
        return False

    try:
        with shard.open("rb") as stream:
            files = tar_file_expander([{"url": shard.name, "stream": stream}], handler=stop)
            yield from group_by_keys(files, handler=stop)
            if not broken and _ends_early(stream):
                report(f"{shard.name}: the shard is damaged (it has no end marker); the rest is skipped")
    except OSError as error:
        report(f"{shard.name}: the shard cannot be read ({error.strerror}); skipped")


def _ends_early(stream: BinaryIO) -> bool:
    """Whether a plain tar file has no empty block where reading it ends: Python also takes a damaged header, or the
    end of the file after a member, for the end of the archive."""
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            archive.getmembers()
    except tarfile.TarError:  # compressed, with an end marker of its own
        return False
    stream.seek(archive.offset)
    return stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)


def _fetch_members(data: DataTable, members: Mapping[str, Any], image: str) -> tuple[bytes, str]:
    if not image:
        present = ", ".join(f".{name}" for name in members if not name.startswith("__"))
        raise Unusable(f"there is no image, only {present}; expected one of {LISTED}")
    for suffix in TEXTS:
        if suffix[1:] in members:
            return members[image], text(members[suffix[1:]], f"its {suffix}")
    if "json" not in members:
        raise Unusable(f"there is no caption, neither {' or '.join(TEXTS)} nor .json")
    try:
        entry = json.loads(members["json"])
    except ValueError as error:
        raise Unusable(f"its .json cannot be read ({first_line(error)})") from None
    if not isinstance(entry, dict):
        raise Unusable("its .json is not a JSON object")
    return members[image], caption(entry.get(data.caption), f"{data.caption} in its .json")


# --- Hugging Face ------------------------------------------------------------------------------------------------


def _huggingface(data: DataTable, report: Report, part: Part) -> Iterator[Entry]:
    import datasets  # takes seconds, needed by this kind only

    if not data.path.is_dir():
        raise _missing(data, "a folder to which a Hugging Face dataset was saved")
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
    for key, column in (("data.image", data.image), ("data.caption", data.caption)):
        if column not in found.column_names:
            raise UserError(
                f"{data.path} has no column {column!r}; it has {', '.join(found.column_names)}. Set {key} to one of "
                f"these."
            )
    try:
        rows = found.select_columns([data.image, data.caption]).cast_column(data.image, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"column {data.image!r} of {data.path} holds no images ({first_line(error)}); expected images, or the "
            f"bytes of image files. Set data.image to another of {', '.join(found.column_names)}."
        ) from None
    stamp = digest(*_dataset_files(data))
    for number in part.take(range(len(rows))):
        yield Entry(f"{data.path.name}, row {number}", stamp, partial(_fetch_row, data, rows, number))


def _dataset_files(data: DataTable) -> Iterator[str]:
    """The files of which a dataset says that it consists; any others are caches of the library."""
    if not data.path.is_dir():
        raise _missing(data, "a folder to which a Hugging Face dataset was saved")
    state = data.path / "state.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        names = [file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
        return (f"{path.name} {_stamp(path)}" for path in (state, *(data.path / name for name in names)))
    return iter(())  # not such a dataset, which ``read`` says


def _fetch_row(data: DataTable, rows: Any, number: int) -> tuple[bytes, str]:
    row = rows[number]
    words, image = caption(row[data.caption], f"column {data.caption}"), row[data.image] or {}
    if image.get("bytes") is not None:
        return image["bytes"], words
    if not image.get("path"):
        raise Unusable(f"there is no image in column {data.image}")
    try:
        return Path(image["path"]).read_bytes(), words
    except OSError as error:
        raise Unusable(f"{image['path']} cannot be read ({error.strerror})") from None


SOURCES: Mapping[str, Callable[[DataTable, Report, Part], Iterator[Entry]]] = {
    "folder": _folder,
    "webdataset": _webdataset,
    "huggingface": _huggingface,
}
LISTINGS: Mapping[str, Callable[[DataTable], Iterator[str]]] = {
    "folder": lambda data: (entry.digest for entry in _folder(data, lambda _: None, WHOLE)),
    "webdataset": lambda data: (f"{path.name} {_stamp(path)}" for path in _shards(data)),
    "huggingface": _dataset_files,
}


# --- messages ----------------------------------------------------------------------------------------------------


def _missing(data: DataTable, expected: str) -> UserError:
    what = "is a file" if data.path.is_file() else "does not exist"
    return UserError(f"data.path {data.path} {what}; expected {expected}, for data.kind = {data.kind!r}. Correct it.")
