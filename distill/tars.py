"""WebDataset shards as a source: tar files, read one sample after another.

Of a plain tar only the headers are read; the content of a sample when it is fetched. So a cache that is continued
passes over what it has at little cost, and no more than one sample is in memory.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from .captions import TEXTS, Report, captions, lines_of, of_row
from .config import DataTable
from .entries import WHOLE, Entry, Part, missing, stamp
from .errors import UserError
from .images import EXTENSIONS, LISTED, Unusable, first_line

META = re.compile(r"__[^/]*__($|/)")
"""Names that WebDataset leaves to its own tools."""
Read = Callable[[], bytes]


def entries(data: DataTable, report: Report, part: Part) -> Iterator[Entry]:
    """The images of one part, in the order of the shards. Where there are fewer shards than processes, these share the
    samples of each shard."""
    shards = named_shards(data)
    of_shards, of_samples = (part, WHOLE) if len(shards) >= part.of else (WHOLE, part)
    for name, shard in of_shards.take(shards):
        own = stamp(shard)
        for members in of_samples.take(_samples(name, shard, report if of_samples.number == 0 else _ignore)):
            suffix = next((suffix for suffix in EXTENSIONS if suffix[1:] in members), "")
            yield Entry(f"{name}/{members['__key__']}{suffix}", own, partial(_fetch, data, members, suffix[1:]))


def named_shards(data: DataTable) -> list[tuple[str, Path]]:
    """The shards that ``data.path`` names, each with its path below the folder that holds them all; those of a pattern
    need not exist. Raises UserError where ``data.path`` is something else."""
    from braceexpand import braceexpand  # WebDataset's own

    if data.path.is_dir():
        shards = sorted(data.path.glob("*.tar"))
        if not shards:
            raise UserError(
                f"{data.path} contains no .tar files; expected WebDataset shards. Correct data.path, or data.kind if "
                f"this is a folder of images or a Hugging Face dataset."
            )
        return [(shard.name, shard) for shard in shards]
    if data.path.is_file():
        return [(data.path.name, data.path)]
    try:
        shards = [Path(name) for name in braceexpand(data.path.as_posix(), escape=False)]
    except ValueError:
        raise UserError(
            f"data.path {data.path} has unbalanced braces; expected a pattern such as shards/{{000..031}}.tar. "
            f"Correct it."
        ) from None
    if len(shards) == 1:
        raise missing(data, "a folder with .tar files, one such file, or a pattern such as shards/{000..031}.tar")
    above = next(folder for folder in data.path.parents if "{" not in folder.as_posix())
    return [(shard.relative_to(above).as_posix(), shard) for shard in shards]


def _ignore(_: str) -> None:
    pass


def _samples(name: str, shard: Path, report: Report) -> Iterator[Mapping[str, Any]]:
    """A shard's samples as WebDataset groups them: ``__key__``, and by lower-case extension without the dot what reads
    the content.

    Where the shard is damaged, that is reported and its rest skipped. A truncated member is left out, so that the last
    sample may lack one.
    """
    from webdataset.tariterators import group_by_keys  # takes seconds, needed by this kind only

    def stop(error: Exception) -> bool:
        report(f"{name}: the shard is damaged ({first_line(error)}); the rest is skipped")
        return False

    try:
        with shard.open("rb") as stream, _opened(stream) as archive:
            yield from group_by_keys(_members(archive, stream, stop), handler=stop)
    except tarfile.TarError as error:
        stop(error)
    except OSError as error:
        report(f"{name}: the shard cannot be read ({error.strerror}); skipped")


def _members(archive: tarfile.TarFile, stream: BinaryIO, stop: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The files of an archive as ``group_by_keys`` takes them, with what reads the content in place of it."""
    is_plain, size = archive.fileobj is stream, os.fstat(stream.fileno()).st_size
    try:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if is_plain and archive.offset > size:
                raise tarfile.ReadError("unexpected end of data")
            if member.isreg() and not META.match(member.name):
                read = partial(_content, archive, member)
                yield {"fname": member.name, "data": read if is_plain else partial(bytes, read()), "__url__": ""}
        # Python also takes a damaged header, or the end of the file after a member, for the end of the archive
        if is_plain:
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end marker")
    except Exception as error:  # compressed files raise EOFError and their libraries' own
        stop(error)


def _opened(stream: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=stream, mode="r:")
    except tarfile.ReadError as error:
        try:
            stream.seek(0)
            return tarfile.open(fileobj=stream, mode="r:*")
        except tarfile.ReadError:
            raise error from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _fetch(data: DataTable, members: Mapping[str, Any], image: str) -> tuple[bytes, tuple[str, ...]]:
    if not image:
        present = ", ".join(f".{name}" for name in members if not name.startswith("__"))
        raise Unusable(f"there is no image, only {present}; expected one of {LISTED}")
    try:
        words = _captions(data, members)
        return members[image](), words
    except (OSError, tarfile.TarError) as error:
        raise Unusable(f"it cannot be read ({first_line(error)})") from None


def _captions(data: DataTable, members: Mapping[str, Read]) -> tuple[str, ...]:
    for suffix in TEXTS:
        if suffix[1:] in members:
            where = f"its {suffix}"
            return captions(lines_of(members[suffix[1:]](), where, data.caption_lines), where)
    if "json" not in members:
        raise Unusable(f"there is no caption, neither {' or '.join(TEXTS)} nor .json")
    try:
        entry = json.loads(members["json"]())
    except ValueError as error:
        raise Unusable(f"its .json cannot be read ({first_line(error)})") from None
    if not isinstance(entry, dict):
        raise Unusable("its .json is not a JSON object")
    return captions(of_row(entry, data.caption), f"{' or '.join(data.caption)} in its .json")
