"""Computes the data cache: every image fitted to its bucket and encoded, every caption embedded, written in shards."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..koala.files import atomic_write as disk
from ..koala.files.unfinished import PATTERN
from . import sources
from .buckets import Size, buckets, fit, nearest
from .cache import INDEX, Cache, Index, Shard, full_identity, ready
from .config import DataTable
from .errors import UserError

PER_SHARD = 256
AT_ONCE = 4
"""Images that are encoded together. Up to that many of each bucket wait in memory, 12 MB each at 1024 x 1024."""
MEMO = 1024
"""Captions whose embeddings are remembered in case they occur again, 0.3 MB each."""
LISTED = 1000
"""Most problems that the index lists."""
SAY_EVERY = 1000
"""Images between two progress messages."""

Row = dict[str, torch.Tensor]
"""One sample's tensors of a shard, without the first dimension."""


class Encoder(Protocol):
    """What is cached of images and captions; tensors of any type, on any device."""

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [n, 3, height, width] in [-1, 1] -> [n, 4, height / 8, width / 8], scaled as the U-Net takes them."""

    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """n captions -> context [n, 77, channels], pooled [n, channels]."""


def build(
    data: DataTable,
    encoder: Encoder | None,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
    report: Callable[[str], None],
) -> Cache:
    """The cache in ``data.cache``, computed now if it is not there yet; by one process at a time.

    Skipped are what ``sources.read`` cannot use, images smaller than their bucket unless ``data.upscale`` is set, and
    those for which the encoder returns infinities or NaN. The cache is computed in ``<cache>.building``, which is
    renamed when it is complete and deleted if anything is raised; one that a killed process left is deleted next time.

    Args:
        data: the table of the configuration.
        encoder: may be None where ``ready`` finds a cache.
        identity: everything on which the encoder's results depend, as values that JSON can hold.
        say: receives progress messages.
        report: receives one line for everything that is skipped.

    Raises UserError as ``ready`` and ``sources.read`` do, where no image is left, and where the disk is full.
    """
    if cache := ready(data, identity):
        say(f"{cache.folder}: {len(cache)} images, cached earlier.")
        return cache
    if encoder is None:
        raise ValueError("there is no cache yet, and no encoder to compute it with")
    problems, skipped = list[str](), 0

    def skip(line: str) -> None:
        nonlocal skipped
        skipped += 1
        if len(problems) < LISTED:
            problems.append(line)
        report(line)

    with _new_folder(data.cache.resolve()) as folder:
        shards = _Shards(folder)
        for done, (bucket, row) in enumerate(_rows(data, encoder, skip), 1):
            shards.add(bucket, row)
            if done % SAY_EVERY == 0:
                say(f"{done} images cached, {skipped} skipped.")
        shards.finish()
        if not shards.written:
            raise UserError(
                f"no image of {data.path} can be cached: {skipped} were skipped (first: {problems[0]}). Expected at "
                f"least one; give other data, or change data.resolution or data.upscale."
            )
        index = Index(
            identity=full_identity(data, identity),
            samples=sum(shard.count for shard in shards.written),
            skipped=skipped,
            shards=tuple(shards.written),
            problems=tuple(problems),
        )
        content = index.model_dump_json(indent=1).encode()
        with disk.written_whole(folder / INDEX, len(content)) as path:
            disk.write_bytes(path, content)
    cache = Cache(data.cache.resolve(), index)
    say(f"{cache.folder}: {index.samples} images cached, {skipped} skipped.")
    return cache


@dataclass(frozen=True)
class _Fitted:
    """An image in its bucket's size, not yet encoded."""

    key: str
    image: torch.Tensor
    caption: str
    ids: torch.Tensor


def _rows(data: DataTable, encoder: Encoder, skip: Callable[[str], None]) -> Iterator[tuple[Size, Row]]:
    """Every usable image: its bucket, and the tensors of its row in a shard."""
    texts = _Texts(encoder)
    waiting: dict[Size, list[_Fitted]] = defaultdict(list)
    for bucket, fitted in _fitted(data, skip):
        waiting[bucket].append(fitted)
        if len(waiting[bucket]) == AT_ONCE:
            yield from ((bucket, row) for row in _encode(encoder, texts, waiting.pop(bucket), skip))
    for bucket, images in waiting.items():
        yield from ((bucket, row) for row in _encode(encoder, texts, images, skip))


def _fitted(data: DataTable, skip: Callable[[str], None]) -> Iterator[tuple[Size, _Fitted]]:
    choices = buckets(data.resolution, data.bucket_step, data.max_aspect)
    generator = torch.Generator().manual_seed(0)  # the same crops every time, as the images come in the same order
    for sample in sources.read(data, skip):
        width, height = sample.image.size
        bucket = nearest(width, height, choices)
        if (width < bucket[0] or height < bucket[1]) and not data.upscale:
            skip(f"{sample.key}: {width} x {height} is smaller than its bucket, {bucket[0]} x {bucket[1]}; skipped")
            continue
        image, (top, left) = fit(sample.image, bucket, data.crop, generator)
        ids = torch.tensor([height, width, top, left, bucket[1], bucket[0]], dtype=torch.int32)
        yield bucket, _Fitted(sample.key, image, sample.caption, ids)


def _encode(encoder: Encoder, texts: _Texts, images: Sequence[_Fitted], skip: Callable[[str], None]) -> Iterator[Row]:
    with torch.no_grad():
        latents = _half(encoder.latents(torch.stack([fitted.image for fitted in images])))
        embedded = texts.embed([fitted.caption for fitted in images])
    for fitted, own, (context, pooled) in zip(images, latents, embedded, strict=True):
        row = {"latents": own, "context": context, "pooled": pooled, "ids": fitted.ids}
        if bad := [name for name, tensor in row.items() if not tensor.isfinite().all()]:
            skip(f"{fitted.key}: {' and '.join(bad)} came out infinite or not a number; skipped")
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
                self.kept[caption] = own[0].clone(), own[1].clone()  # views would keep the whole batch in memory
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
    """Collects rows into shards."""

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
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder, ``<target>.building``, which is renamed at the end, or deleted if anything is raised.

    Raises UserError in place of the OSErrors of writing.
    """
    folder = target.with_name(f"{target.name}.building")
    try:
        if folder.exists():
            _delete(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made for the data cache ({error.strerror}); expected an unused name, or the folder of "
            f"an interrupted build. Delete the folder if it exists, or choose another data.cache."
        ) from None
    try:
        yield folder
        try:
            if target.is_dir():
                target.rmdir()  # empty
            folder.rename(target)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be renamed to {target.name} ({error.strerror}); expected that name to be unused. "
                f"Choose another data.cache."
            ) from None
    except BaseException as error:
        with suppress(OSError):  # the first error matters more
            _delete(folder)
        if isinstance(error, disk.SaveError):
            raise UserError(f"the data cache is not finished: {error}") from None
        raise


def _delete(folder: Path) -> None:
    """Delete an unfinished cache: its own files, including partly written ones, then the folder. Raises OSError if
    anything else is in it."""
    for pattern in ("latents-*.safetensors*", f"{INDEX}*"):
        for path in folder.glob(pattern):
            path.unlink()
    for path in folder.glob(PATTERN):
        shutil.rmtree(path)
    folder.rmdir()
