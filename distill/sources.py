"""Images with captions, one at a time: from a folder, WebDataset shards or a Hugging Face dataset on disk.

What cannot be used is reported and skipped; only a source without a single usable image is an error.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from .config import DataTable
from .errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LISTED = ", ".join(EXTENSIONS)

Report = Callable[[str], None]
Fetch = Callable[[], tuple[bytes, str]]
"""Returns an image's file content and its caption; raises Unusable where either is missing."""


@dataclass(frozen=True)
class Sample:
    """An image with its caption."""

    key: str
    """Where it came from: a file below the folder, a member of a shard, or a row of a dataset."""
    image: Image.Image
    """RGB, in its intended orientation."""
    caption: str
    """Not empty."""


class Unusable(Exception):
    """One image that cannot be used; the message says why."""


def read(data: DataTable, report: Report) -> Iterator[Sample]:
    """Read every usable image, always in the same order.

    ``report`` receives a line for each image or shard that is skipped. Raises UserError where the source does not
    exist, is something else, or contains nothing usable; the last is known only at its end.
    """
    usable, faults, first = 0, 0, ""

    def skip(line: str) -> None:
        nonlocal faults, first
        faults, first = faults + 1, first or line
        report(line)

    for key, fetch in SOURCES[data.kind](data, skip):
        try:
            content, caption = fetch()
            sample = Sample(key, decode(content), caption)
        except Unusable as fault:
            skip(f"{key}: {fault}; skipped")
        else:
            usable += 1
            yield sample
    if not usable:
        why = f"{faults} entries were skipped (first: {first})" if faults else "it is empty"
        raise UserError(
            f"{data.path} has no usable image with a caption: {why}. Expected at least one; repair the data, or "
            f"correct data.path, data.image or data.caption."
        )


# --- images ------------------------------------------------------------------------------------------------------


def decode(content: bytes) -> Image.Image:
    """A file's image as RGB: rotated as its EXIF data says, transparency on white, 16-bit grey scaled to 8 bits.

    Raises Unusable for what is not an image, or not a complete one.
    """
    if not content:
        raise Unusable("the file is empty")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library may have set it; missing parts would then be grey
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return _rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:  # its text is an object's address
        raise Unusable("this is not an image, or not in a known format") from None
    except Exception as error:  # decoders raise nearly anything for damaged files: OSError, SyntaxError, ValueError
        raise Unusable(f"the image cannot be decoded ({_first_line(error)})") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip at 255
        return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


# --- a folder ----------------------------------------------------------------------------------------------------


def _folder(data: DataTable, report: Report) -> Iterator[tuple[str, Fetch]]:
    if not data.path.is_dir():
        raise _missing(data, f"a folder with images ({LISTED})")
    files = sorted(path for path in data.path.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not files:
        raise UserError(
            f"{data.path} contains no images, nor do its subfolders; expected {LISTED} with captions beside them. "
            f"Correct data.path, or data.kind if these are WebDataset shards or a Hugging Face dataset."
        )
    metadata = lru_cache(maxsize=1)(partial(_metadata, data, report))  # files of a folder come one after another
    for file in files:
        yield file.relative_to(data.path).as_posix(), partial(_fetch_file, data, file, metadata)


def _fetch_file(data: DataTable, file: Path, metadata: Callable[[Path], Mapping[str, Any]]) -> tuple[bytes, str]:
    beside = file.with_suffix(".txt")
    try:
        if beside.is_file():
            return file.read_bytes(), _text(beside.read_bytes(), beside.name)
        entries = metadata(file.parent)
        if file.name not in entries:
            raise Unusable(f"there is no caption, neither in {beside.name} nor in metadata.jsonl")
        return file.read_bytes(), _caption(entries[file.name], f"{data.caption} in metadata.jsonl")
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from None


def _metadata(data: DataTable, report: Report, folder: Path) -> dict[str, Any]:
    """A folder's metadata.jsonl: file name -> caption as given there. Empty where there is no such file."""
    path, captions = folder / "metadata.jsonl", dict[str, Any]()
    if not path.is_file():
        return captions
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                entry = json.loads(line)
                captions[entry["file_name"]] = entry.get(data.caption, entry.get("text"))
            except (ValueError, KeyError, TypeError, AttributeError):
                name = path.relative_to(data.path).as_posix()
                report(f"{name}, line {number}: this is not a JSON object with a file_name; skipped")
    return captions


# --- WebDataset --------------------------------------------------------------------------------------------------


def _webdataset(data: DataTable, report: Report) -> Iterator[tuple[str, Fetch]]:
    for shard in _shards(data):
        for members in _members(shard, report):
            suffix = next((suffix for suffix in EXTENSIONS if suffix[1:] in members), "")
            key = f"{shard.name}/{members['__key__']}{suffix}"
            yield key, partial(_fetch_members, data, members, suffix[1:])


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
            report(f"{shard.name}: the shard is damaged ({_first_line(error)}); the rest is skipped")
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
    if "txt" in members:
        return members[image], _text(members["txt"], "its .txt")
    if "json" not in members:
        raise Unusable("there is no caption, neither .txt nor .json")
    try:
        entry = json.loads(members["json"])
    except ValueError as error:
        raise Unusable(f"its .json cannot be read ({_first_line(error)})") from None
    if not isinstance(entry, dict):
        raise Unusable("its .json is not a JSON object")
    return members[image], _caption(entry.get(data.caption), f"{data.caption} in its .json")


# --- Hugging Face ------------------------------------------------------------------------------------------------


def _huggingface(data: DataTable, report: Report) -> Iterator[tuple[str, Fetch]]:
    import datasets  # takes seconds, needed by this kind only

    if not data.path.is_dir():
        raise _missing(data, "a folder to which a Hugging Face dataset was saved")
    try:
        found = datasets.load_from_disk(str(data.path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{data.path} is not a readable Hugging Face dataset ({_first_line(error)}); expected what "
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
            f"column {data.image!r} of {data.path} holds no images ({_first_line(error)}); expected images, or the "
            f"bytes of image files. Set data.image to another of {', '.join(found.column_names)}."
        ) from None
    for number, row in enumerate(rows):
        yield f"{data.path.name}, row {number}", partial(_fetch_row, data, row)


def _fetch_row(data: DataTable, row: Mapping[str, Any]) -> tuple[bytes, str]:
    caption, image = _caption(row[data.caption], f"column {data.caption}"), row[data.image] or {}
    if image.get("bytes") is not None:
        return image["bytes"], caption
    if not image.get("path"):
        raise Unusable(f"there is no image in column {data.image}")
    try:
        return Path(image["path"]).read_bytes(), caption
    except OSError as error:
        raise Unusable(f"{image['path']} cannot be read ({error.strerror})") from None


SOURCES: Mapping[str, Callable[[DataTable, Report], Iterator[tuple[str, Fetch]]]] = {
    "folder": _folder,
    "webdataset": _webdataset,
    "huggingface": _huggingface,
}


# --- captions and messages ---------------------------------------------------------------------------------------


def _text(content: bytes, where: str) -> str:
    """A text file's caption, in UTF-8 with or without a byte order mark. Raises Unusable for none."""
    try:
        return _caption(content.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        raise Unusable(f"the caption in {where} is not UTF-8 text") from None


def _caption(found: Any, where: str) -> str:
    """A caption without surrounding whitespace. Raises Unusable for none, or for what is not text."""
    if not isinstance(found, str | None):
        raise Unusable(f"the caption ({where}) is {type(found).__name__}, not text")
    if not (found and found.strip()):
        raise Unusable(f"there is no caption ({where} is missing or empty)")
    return found.strip()


def _missing(data: DataTable, expected: str) -> UserError:
    what = "is a file" if data.path.is_file() else "does not exist"
    return UserError(f"data.path {data.path} {what}; expected {expected}, for data.kind = {data.kind!r}. Correct it.")


def _first_line(error: Exception) -> str:
    """An error's message, without the open file and its name, which WebDataset adds."""
    said = (isinstance(error, OSError) and error.strerror) or next(iter(error.args), "")
    return next(iter(str(said).partition(" @ <")[0].splitlines()), type(error).__name__)
