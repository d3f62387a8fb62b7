"""Latents and text embeddings of a data set, computed once: safetensors shards of one bucket each, and an index."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ..koala.files import atomic_write as disk
from . import sources
from .buckets import Size, buckets, fit, nearest
from .config import DataTable
from .errors import UserError

INDEX = "index.json"
FORMAT = 1
SETTINGS = ("kind", "image", "caption", "resolution", "bucket_step", "max_aspect", "upscale", "crop")
"""The settings that what is cached depends on, beside the path."""

PER_SHARD = 256
AT_ONCE = 4
"""Pictures that are encoded together. So many of each bucket wait in memory, 12 MB each at 1024 x 1024."""
MEMO = 1024
"""Captions whose embeddings are kept for when they come again, 0.3 MB each."""
LISTED = 1000
"""Problems that the index lists at most."""
SAY_EVERY = 1000


class Encoder(Protocol):
    """What is cached of pictures and captions; tensors of any type, on any device."""

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [n, 3, height, width] in [-1, 1] -> [n, 4, height / 8, width / 8], scaled as the U-Net takes them."""

    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """n captions -> context [n, 77, channels], pooled [n, channels]."""


# --- the index ---------------------------------------------------------------------------------------------------


class Shard(BaseModel):
    """A file of the cache: tensors latents, context, pooled (fp16) and ids (int32), ``count`` rows each."""

    model_config = ConfigDict(frozen=True)
    file: str
    bucket: Size
    count: PositiveInt


class Index(BaseModel):
    """What index.json holds. It is written last: a folder without it is no cache."""

    model_config = ConfigDict(frozen=True)
    identity: dict[str, Any]
    """What the cache was computed from; a run with anything else cannot use it."""
    samples: int
    skipped: int
    """Pictures that were left out, and shards or lines that could not be read."""
    shards: tuple[Shard, ...] = Field(min_length=1)
    problems: tuple[str, ...]
    """Why, for the first ``LISTED`` of them."""


def whole_identity(data: DataTable, identity: Mapping[str, Any]) -> dict[str, Any]:
    """All that a cache depends on, as JSON gives it back; ``identity`` is what the encoder comes from."""
    settings = {f"data.{name}": getattr(data, name) for name in SETTINGS}
    path = {"data.path": data.path.resolve().as_posix()}  # the same whatever folder a run is started in
    return json.loads(json.dumps({"format": FORMAT, **path, **settings, **identity}))


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass
class Cache(Dataset[dict[str, torch.Tensor]]):
    """A cache on disk as a dataset. Shards are mapped into memory when first read, in each process by itself."""

    folder: Path
    index: Index
    _ends: list[int] = field(init=False, repr=False)
    _opened: dict[int, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = list(accumulate(shard.count for shard in self.index.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """float32 tensors: latents [4, h, w], context [77, c], pooled [p], ids [6] (SDXL's sizes: original height and
        width, crop top and left, height and width). Raises UserError where the shard is damaged."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = bisect_right(self._ends, number)
        if which not in self._opened:
            self._opened[which] = self._open(self.index.shards[which])
        row = number - self._ends[which] + self.index.shards[which].count
        names = ("latents", "context", "pooled", "ids")
        return {name: self._opened[which].get_slice(name)[row].float() for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which do not go to another process."""
        return self.__dict__ | {"_opened": {}}

    @property
    def bucket_of(self) -> list[int]:
        """The bucket of each sample, a number; samples of one number have one size."""
        sizes = sorted({shard.bucket for shard in self.index.shards})
        return [sizes.index(shard.bucket) for shard in self.index.shards for _ in range(shard.count)]

    def check(self) -> None:
        """Open every shard once. Raises UserError for the first that is missing, cut short or another one."""
        for shard in self.index.shards:
            self._open(shard)

    def _open(self, shard: Shard) -> Any:
        path = self.folder / shard.file
        try:
            opened = safe_open(path, framework="pt")
            rows = opened.get_slice("latents").get_shape()[0]
        except (SafetensorError, OSError) as error:
            raise self._damaged(path, str(error)) from None
        if rows != shard.count:
            raise self._damaged(path, f"{rows} samples, not {shard.count}")
        return opened

    def _damaged(self, path: Path, found: str) -> UserError:
        return UserError(
            f"{path} is damaged ({found}); expected a part of the data cache. Delete the folder {self.folder} and run "
            f"again: it is then computed anew."
        )


def ready(data: DataTable, identity: Mapping[str, Any]) -> Cache | None:
    """The cache in ``data.cache``, whose shards are all there; None where there is none yet.

    Raises UserError where it is damaged, was computed from something else, or where something else is in the folder.
    """
    folder = data.cache.resolve()
    advice = "Choose another folder as data.cache, or delete this one."
    try:
        content = (folder / INDEX).read_bytes()
    except FileNotFoundError:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"data.cache {folder} is a folder with other files and no {INDEX}; expected a data cache, an empty "
                f"folder or none. {advice}"
            ) from None
        return None
    except OSError as error:
        raise UserError(
            f"{folder / INDEX} cannot be read ({error.strerror}); expected a data cache's. {advice}"
        ) from None
    try:
        index = Index.model_validate_json(content)
    except ValidationError:
        raise UserError(f"{folder / INDEX} is damaged, or not a data cache's; expected one. {advice}") from None
    wanted = whole_identity(data, identity)
    different = [
        f"{name} = {index.identity.get(name)!r} (here {wanted.get(name)!r})"
        for name in (*wanted, *(name for name in index.identity if name not in wanted))
        if index.identity.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"the data cache in {folder} was computed with {', '.join(different)}; expected one with this run's "
            f"settings. {advice}"
        )
    cache = Cache(folder, index)
    cache.check()
    return cache


# --- writing -----------------------------------------------------------------------------------------------------


def build(
    data: DataTable,
    encoder: Encoder | None,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
    report: Callable[[str], None],
) -> Cache:
    """The cache in ``data.cache``, computed now if it is not there yet; by one process at a time.

    ``encoder`` may be None where ``ready`` finds a cache; ``identity`` names, for JSON, whatever its results depend on.
    ``report`` gets a line for all that is skipped: what ``sources.read`` cannot use, pictures smaller than their bucket
    unless ``data.upscale`` is set, and those for which the encoder gives infinities or NaN. The cache is computed in
    ``<cache>.building``, which gets the name when it is whole; whatever is raised on the way, that folder is deleted,
    and one left by a killed process is deleted the next time.

    Raises UserError as ``ready`` and ``sources.read`` do, where no picture is left, and where the disk is full.
    """
    if cache := ready(data, identity):
        say(f"{cache.folder}: {len(cache)} pictures, cached earlier.")
        return cache
    if encoder is None:
        raise ValueError("there is no cache yet, and nothing to compute it with")
    problems, skipped = list[str](), 0

    def skip(line: str) -> None:
        nonlocal skipped
        skipped += 1
        if len(problems) < LISTED:
            problems.append(line)
        report(line)

    with _folder_of_its_own(data.cache.resolve()) as folder:
        shards = _Shards(folder)
        for done, (bucket, row) in enumerate(_rows(data, encoder, skip), 1):
            shards.add(bucket, row)
            if done % SAY_EVERY == 0:
                say(f"{done} pictures cached, {skipped} skipped.")
        shards.finish()
        if not shards.written:
            raise UserError(
                f"no picture of {data.path} can be cached: {skipped} were skipped, the first as {problems[0]}. "
                f"Expected at least one; give other data, or change data.resolution or data.upscale."
            )
        index = Index(
            identity=whole_identity(data, identity),
            samples=sum(shard.count for shard in shards.written),
            skipped=skipped,
            shards=tuple(shards.written),
            problems=tuple(problems),
        )
        content = index.model_dump_json(indent=1).encode()
        with disk.written_whole(folder / INDEX, len(content)) as path:
            disk.write_bytes(path, content)
    cache = Cache(data.cache.resolve(), index)
    say(f"{cache.folder}: {index.samples} pictures cached, {skipped} skipped.")
    return cache


@dataclass(frozen=True)
class _Fitted:
    """A picture in its bucket's size, not yet encoded."""

    key: str
    picture: torch.Tensor
    caption: str
    ids: torch.Tensor


Row = dict[str, torch.Tensor]


def _rows(data: DataTable, encoder: Encoder, skip: Callable[[str], None]) -> Iterator[tuple[Size, Row]]:
    """Every usable picture as its bucket and the tensors of its row in a shard."""
    texts = _Texts(encoder)
    waiting: dict[Size, list[_Fitted]] = defaultdict(list)
    for bucket, fitted in _fitted(data, skip):
        waiting[bucket].append(fitted)
        if len(waiting[bucket]) == AT_ONCE:
            yield from ((bucket, row) for row in _encode(encoder, texts, waiting.pop(bucket), skip))
    for bucket, some in waiting.items():
        yield from ((bucket, row) for row in _encode(encoder, texts, some, skip))


def _fitted(data: DataTable, skip: Callable[[str], None]) -> Iterator[tuple[Size, _Fitted]]:
    choices = buckets(data.resolution, data.bucket_step, data.max_aspect)
    generator = torch.Generator().manual_seed(0)  # always the same cuts, as the pictures come in the same order
    for sample in sources.read(data, skip):
        width, height = sample.image.size
        bucket = nearest(width, height, choices)
        if (width < bucket[0] or height < bucket[1]) and not data.upscale:
            skip(f"{sample.key}: {width} x {height} is smaller than its bucket, {bucket[0]} x {bucket[1]}; skipped")
            continue
        picture, (top, left) = fit(sample.image, bucket, data.crop, generator)
        ids = torch.tensor([height, width, top, left, bucket[1], bucket[0]], dtype=torch.int32)
        yield bucket, _Fitted(sample.key, picture, sample.caption, ids)


def _encode(
    encoder: Encoder, texts: _Texts, some: Sequence[_Fitted], skip: Callable[[str], None]
) -> Iterator[dict[str, torch.Tensor]]:
    with torch.no_grad():
        latents = _half(encoder.latents(torch.stack([fitted.picture for fitted in some])))
        embedded = texts.embed([fitted.caption for fitted in some])
    for fitted, own, (context, pooled) in zip(some, latents, embedded, strict=True):
        row = {"latents": own, "context": context, "pooled": pooled, "ids": fitted.ids}
        if odd := [name for name, tensor in row.items() if not tensor.isfinite().all()]:
            skip(f"{fitted.key}: {' and '.join(odd)} came out infinite or not a number; skipped")
        else:
            yield row


@dataclass
class _Texts:
    """Embeddings of captions; the ``MEMO`` last used are not computed again."""

    encoder: Encoder
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def embed(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Context [77, c] and pooled [p] of each, float16 on the CPU."""
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self.kept]:
            context, pooled = map(_half, self.encoder.texts(new))
            for caption, *own in zip(new, context, pooled, strict=True):
                self.kept[caption] = own[0].clone(), own[1].clone()  # else each would keep all of them in memory
        for caption in captions:
            self.kept[caption] = self.kept.pop(caption)  # to the end: used last
        found = [self.kept[caption] for caption in captions]
        for caption in list(self.kept)[:-MEMO]:
            del self.kept[caption]
        return found


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.float16)


@dataclass
class _Shards:
    """Rows on their way into shards."""

    folder: Path
    written: list[Shard] = field(default_factory=list)
    waiting: dict[Size, list[Row]] = field(default_factory=lambda: defaultdict(list))

    def add(self, bucket: Size, row: Row) -> None:
        """Take a row; a bucket's shard is written once it is full. Raises SaveError."""
        self.waiting[bucket].append(row)
        if len(self.waiting[bucket]) == PER_SHARD:
            self._write(bucket, self.waiting.pop(bucket))

    def finish(self) -> None:
        """Write the shards that are not full. Raises SaveError."""
        for bucket, rows in sorted(self.waiting.items()):
            self._write(bucket, rows)

    def _write(self, bucket: Size, rows: Sequence[Row]) -> None:
        shard = Shard(
            file=f"latents-{len(self.written):05}-{bucket[0]}x{bucket[1]}.safetensors", bucket=bucket, count=len(rows)
        )
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        with disk.written_whole(self.folder / shard.file, sum(tensor.nbytes for tensor in tensors.values())) as path:
            disk.write_safetensors(path, tensors, {})
        self.written.append(shard)


@contextmanager
def _folder_of_its_own(target: Path) -> Iterator[Path]:
    """Yield a new folder, ``<target>.building``, which gets its name at the end; it is deleted if anything is raised.

    Raises UserError in place of the OSErrors of writing.
    """
    folder = target.with_name(f"{target.name}.building")
    try:
        if folder.exists():
            _delete(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made for the data cache ({error.strerror}); expected a folder that is free or left by "
            f"a build that was interrupted. Delete it if it is there, or choose another data.cache."
        ) from None
    try:
        yield folder
        try:
            if target.is_dir():
                target.rmdir()  # empty
            folder.rename(target)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be renamed to {target.name} ({error.strerror}); expected that to be free. Choose "
                f"another data.cache."
            ) from None
    except BaseException as error:
        with suppress(OSError):  # what led here matters more
            _delete(folder)
        if isinstance(error, disk.SaveError):
            raise UserError(f"the data cache is not finished: {error}") from None
        raise


def _delete(folder: Path) -> None:
    """Delete a cache that was not finished: its own files, partly written ones too, and the folder if nothing else is
    in it. Raises OSError if something is."""
    for pattern in ("latents-*.safetensors*", f"{INDEX}*"):
        for path in folder.glob(pattern):
            path.unlink()
    folder.rmdir()
