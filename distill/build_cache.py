"""Computes the data cache: every image fitted to its bucket and encoded, every caption embedded or cut into tokens.

It is written in shards. A shard is written once and never again: whatever ends the work, the next one continues it, and
images that are new in the source are added. Several processes share the work by ``entries.Part``.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..koala.files import atomic_write as disk
from ..koala.files.unfinished import PATTERN
from . import cache, sources
from .buckets import Size, buckets, fit, nearest
from .cache import INDEX, OF_CAPTIONS, Cache, Index, Shard, full_identity, opened_shard
from .config import DataTable
from .entries import WHOLE, Digests, Entry, Part, digest
from .errors import UserError

PER_SHARD = 256
AT_ONCE = 4
"""Images that are encoded together. Up to that many of each bucket wait in memory, 12 MB each at 1024 x 1024."""
MEMO = 1024
"""Captions whose embeddings are remembered in case they occur again, 0.3 MB each."""
LISTED = 1000
"""Most problems that the index lists, and that each process reports."""
SAY_EVERY = 1000
"""Images between two progress messages."""
SHARDS = "latents-*.safetensors"

UNUSABLE = "unusable"
"""The reason for whatever is skipped for another reason than its size."""

Row = dict[str, torch.Tensor]
"""One image's tensors of a shard; those of ``OF_CAPTIONS`` have a first dimension, its captions."""


class Skip(Protocol):
    """Takes what is skipped: a line that names it and says why, and a reason by which it is counted."""

    def __call__(self, line: str, why: str = UNUSABLE) -> None: ...


class Encoder(Protocol):
    """What is cached of images and captions; tensors of any type, on any device."""

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [n, 3, height, width] in [-1, 1] -> [n, 4, height / 8, width / 8], scaled as the U-Net takes them."""

    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """n captions -> context [n, 77, channels], pooled [n, channels]."""

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """n captions -> the tokens of each for the two text encoders, integers [n, 2, 77]."""

    def lengths(self, captions: list[str]) -> list[int]:
        """The tokens of each caption, start and end included, however many they are."""


class Plan(NamedTuple):
    """What is to be done, the same for every process."""

    listing: str
    """``sources.listing`` before the first image is read."""
    cached: Digests
    """The images that the cache holds already."""
    first: int
    """The number of the next shard."""


class Outcome(NamedTuple):
    """What one process found."""

    present: Digests
    """Every image of its part, cached before or now, or skipped."""
    left_out: Counter[str]
    """Reason -> what was skipped for it."""
    problems: list[str]
    """The first of them."""


def build(
    data: DataTable,
    encoder: Encoder | None,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
    report: Callable[[str], None],
) -> Cache:
    """The cache in ``data.cache``, computed, continued or extended where that is necessary; by one process at a time.

    Skipped are what ``sources.read`` cannot use, images whose size ``data`` does not want, and those for which the
    encoder returns infinities or NaN. Whatever is raised, finished shards stay.

    Args:
        data: the table of the configuration.
        encoder: may be None where ``cache.ready`` finds a cache.
        identity: everything on which the encoder's results depend, as values that JSON can hold.
        say: receives progress messages.
        report: receives one line for everything that is skipped.

    Raises UserError as ``cache.ready`` and ``sources.read`` do, where no image is left, and where the disk is full.
    """
    if found := cache.ready(data, identity):
        say(f"{found.folder}: {len(found)} images, cached earlier.")
        return found
    if encoder is None:
        raise ValueError("the cache is not complete, and there is no encoder to compute it with")
    plan = begin(data, identity, say)
    return finish(data, identity, plan, [encode(data, encoder, plan, WHOLE, say, report)], say)


def begin(data: DataTable, identity: Mapping[str, Any], say: Callable[[str], None]) -> Plan:
    """Prepare the folder, on one process, and see what is in it. Raises UserError as ``build`` does."""
    index, listing, folder = cache.read_index(data, identity), sources.listing(data), data.cache.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(PATTERN):  # of a process that was killed
            shutil.rmtree(left)
        if index is None:
            _write_index(folder, Index(identity=full_identity(data, identity)))
    except OSError as error:
        raise UserError(
            f"data.cache {folder} cannot be written to ({error.strerror or error}); expected a folder for the data "
            f"cache. Make it writable, or choose another data.cache."
        ) from None
    paths = sorted(folder.glob(SHARDS))
    cached = Digests()
    for path in paths:
        for image in _images(path):
            cached.add(image)
    if len(cached):
        changed = index is not None and index.listing not in ("", listing)
        why = "the images have changed since they were cached" if changed else "it is not complete"
        say(f"{folder}: {why}; {len(cached)} images in it are kept, and what it lacks is computed.")
    return Plan(listing, cached, 1 + max((int(path.name.split("-")[1]) for path in paths), default=-1))


def encode(
    data: DataTable,
    encoder: Encoder,
    plan: Plan,
    part: Part,
    say: Callable[[str], None],
    report: Callable[[str], None],
) -> Outcome:
    """Encode what the cache lacks of one part, and write it in shards. Raises UserError as ``build`` does."""
    outcome = Outcome(Digests(), Counter(), [])

    def skip(line: str, why: str = UNUSABLE) -> None:
        outcome.left_out[why] += 1
        if len(outcome.problems) < LISTED:
            outcome.problems.append(line)
            report(line)
        elif outcome.left_out.total() == LISTED + 1:
            report("Whatever else is skipped is counted, not named.")

    def wanted(entry: Entry) -> bool:
        own = entry.digest
        outcome.present.add(own)
        return own not in plan.cached

    shards = _Shards(data.cache.resolve(), plan.first + part.number, part.of)
    try:
        for done, (bucket, image, row) in enumerate(_rows(data, encoder, part, wanted, skip), 1):
            shards.add(bucket, image, row)
            if done % SAY_EVERY == 0:
                say(f"{done} images cached, {outcome.left_out.total()} skipped.")
        shards.finish()
    except disk.SaveError as error:
        raise UserError(f"the data cache is not finished: {error}") from None
    return outcome


def finish(
    data: DataTable,
    identity: Mapping[str, Any],
    plan: Plan,
    outcomes: Sequence[Outcome],
    say: Callable[[str], None],
) -> Cache:
    """Write the index, on one process, after all parts are encoded. Raises UserError as ``build`` does."""
    folder, left_out = data.cache.resolve(), sum((outcome.left_out for outcome in outcomes), Counter[str]())
    problems = [line for outcome in outcomes for line in outcome.problems][:LISTED]
    present = Digests(bytearray().join(outcome.present.content for outcome in outcomes))
    shards = [shard for path in sorted(folder.glob(SHARDS)) if (shard := _shard(path, present)).used]
    if not shards:
        why = _counted(left_out, f"first: {problems[0]}") if problems else "there is none"
        raise UserError(
            f"no image of {data.path} can be cached: {why}. Expected at "
            f"least one; give other data, or change data.resolution, data.upscale or data.min_side."
        )
    lengths, jpeg = map(torch.cat, zip(*(_columns(folder, shard) for shard in shards), strict=True))
    index = Index(
        identity=full_identity(data, identity),
        listing=plan.listing,
        samples=len(jpeg),
        skipped=left_out.total(),
        left_out=dict(sorted(left_out.items())),
        shards=tuple(shards),
        problems=tuple(problems),
        captions=len(lengths),
        long_captions=int((lengths > cache.TOKENS).sum()),
        longest_caption=int(lengths.max()),
        jpegs=int((jpeg > 0).sum()),
        poor_jpegs=int(((jpeg > 0) & (jpeg <= cache.POOR_JPEG)).sum()),
    )
    try:
        _write_index(folder, index)
    except disk.SaveError as error:
        raise UserError(f"the data cache is not finished: {error}") from None
    gone = sum(len(shard.unused) for shard in shards)
    aside = f" {gone} in it are of images that have changed or are gone, and are not used." if gone else ""
    say(f"{folder}: {index.samples} images cached, {_counted(left_out)}.{aside}")
    return Cache(folder, index)


def _write_index(folder: Path, index: Index) -> None:
    disk.replace_file(folder / INDEX, index.model_dump_json(indent=1))


def _images(path: Path) -> list[str]:
    """The images of a shard's rows, ``Entry.digest`` each."""
    return json.loads(opened_shard(path)[0].metadata()["images"])


def _counted(left_out: Counter[str], *more: str) -> str:
    """How many were skipped, for which reasons, and whatever else there is to say of them."""
    said = "; ".join((", ".join(f"{count} {why}" for why, count in sorted(left_out.items())), *more))
    return f"{left_out.total()} skipped{f' ({said})' if said else ''}"


def _shard(path: Path, present: Digests) -> Shard:
    """A shard's description, for a source with the images that are ``present``."""
    bucket = tuple(int(side) for side in path.stem.split("-")[2].split("x"))
    images = _images(path)
    unused = tuple(row for row, image in enumerate(images) if image not in present)
    return Shard(file=path.name, bucket=(bucket[0], bucket[1]), count=len(images), unused=unused)


def _columns(folder: Path, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """The lengths of the captions and the JPEG qualities of a shard's used rows."""
    opened = opened_shard(folder / shard.file)[0]
    used = torch.ones(shard.count, dtype=torch.bool)
    used[list(shard.unused)] = False
    of_captions = used.repeat_interleave(opened.get_tensor("captions"))
    return opened.get_tensor("lengths")[of_captions], opened.get_tensor("jpeg")[used]


@dataclass(frozen=True)
class _Fitted:
    """An image in its bucket's size, not yet encoded."""

    sample: sources.Sample
    image: torch.Tensor
    ids: torch.Tensor


def _rows(
    data: DataTable,
    encoder: Encoder,
    part: Part,
    wanted: Callable[[Entry], bool],
    skip: Skip,
) -> Iterator[tuple[Size, str, Row]]:
    """Every usable image of a part: its bucket, its digest, and the tensors of its row in a shard."""
    texts = _Texts(encoder, data.texts == "embeddings")
    waiting: dict[Size, list[_Fitted]] = defaultdict(list)
    for bucket, fitted in _fitted(data, part, wanted, skip):
        waiting[bucket].append(fitted)
        if len(waiting[bucket]) == AT_ONCE:
            yield from ((bucket, *row) for row in _encode(encoder, texts, waiting.pop(bucket), skip))
    for bucket, images in waiting.items():
        yield from ((bucket, *row) for row in _encode(encoder, texts, images, skip))


def _fitted(data: DataTable, part: Part, wanted: Callable[[Entry], bool], skip: Skip) -> Iterator[tuple[Size, _Fitted]]:
    choices = buckets(data.resolution, data.bucket_step, data.max_aspect)
    for sample in sources.read(data, skip, part, wanted):
        width, height = sample.image.size
        bucket = nearest(width, height, choices)
        if reason := _reason(data, width, height, bucket):
            skip(f"{sample.key}: {width} x {height} {reason[0]}; skipped", reason[1])
            continue
        # the same crop every time, whichever images come before
        generator = torch.Generator().manual_seed(int(digest(sample.key)[:15], 16))
        image, (top, left) = fit(sample.image, bucket, data.crop, generator)
        ids = torch.tensor([height, width, top, left, bucket[1], bucket[0]], dtype=torch.int32)
        yield bucket, _Fitted(sample, image, ids)


def _reason(data: DataTable, width: int, height: int, bucket: Size) -> tuple[str, str] | None:
    """Why ``data`` does not want an image of this size: in its own line, and as it is counted. None where it does."""
    if min(width, height) < data.min_side:
        return f"has a side below data.min_side = {data.min_side}", "below data.min_side"
    if 0 < data.max_image_aspect < max(width, height) / min(width, height):
        return f"is above data.max_image_aspect = {data.max_image_aspect}", "above data.max_image_aspect"
    if (width < bucket[0] or height < bucket[1]) and not data.upscale:
        return f"is smaller than its bucket, {bucket[0]} x {bucket[1]}", "smaller than their bucket"
    return None


def _encode(encoder: Encoder, texts: _Texts, images: Sequence[_Fitted], skip: Skip) -> Iterator[tuple[str, Row]]:
    counts = [len(fitted.sample.captions) for fitted in images]
    with torch.no_grad():
        latents = _half(encoder.latents(torch.stack([fitted.image for fitted in images])))
        of_captions = texts.of([caption for fitted in images for caption in fitted.sample.captions])
    numbers = torch.tensor([[fitted.sample.jpeg for fitted in images], counts], dtype=torch.int32)
    parts = zip(*(tensor.split(counts) for tensor in of_captions.values()), strict=True)
    for fitted, own, (jpeg, count), texts_of in zip(images, latents, numbers.T, parts, strict=True):
        row = {"latents": own, "ids": fitted.ids, "jpeg": jpeg, "captions": count}
        row |= {name: tensor.clone() for name, tensor in zip(of_captions, texts_of, strict=True)}
        if bad := [name for name, tensor in row.items() if not tensor.isfinite().all()]:
            skip(f"{fitted.sample.key}: {' and '.join(bad)} came out infinite or not a number; skipped")
        else:
            yield fitted.sample.digest, row


@dataclass
class _Texts:
    """What is cached of captions; the ``MEMO`` embeddings last used are not computed again."""

    encoder: Encoder
    embeds: bool
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of(self, captions: list[str]) -> Row:
        """The tensors of ``OF_CAPTIONS``, on the CPU, with a row for each of these captions."""
        lengths = torch.tensor(self.encoder.lengths(captions), dtype=torch.int32)
        if not self.embeds:
            return {"tokens": self.encoder.tokens(captions).to("cpu", torch.int32), "lengths": lengths}
        context, pooled = map(torch.stack, zip(*self._embed(captions), strict=True))
        return {"context": context, "pooled": pooled, "lengths": lengths}

    def _embed(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
    """Collects one process's rows into shards, which it gives every ``step``-th number."""

    folder: Path
    number: int
    step: int
    waiting: dict[Size, list[tuple[str, Row]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, bucket: Size, image: str, row: Row) -> None:
        """Take a row; a bucket's shard is written once it is full. Raises SaveError."""
        self.waiting[bucket].append((image, row))
        if len(self.waiting[bucket]) == PER_SHARD:
            self._write(bucket, self.waiting.pop(bucket))

    def finish(self) -> None:
        """Write the shards that are not full. Raises SaveError."""
        for bucket, rows in sorted(self.waiting.items()):
            self._write(bucket, rows)

    def _write(self, bucket: Size, rows: Sequence[tuple[str, Row]]) -> None:
        path = self.folder / f"latents-{self.number:05}-{bucket[0]}x{bucket[1]}.safetensors"
        tensors = {
            name: (torch.cat if name in OF_CAPTIONS else torch.stack)([row[name] for _, row in rows])
            for name in rows[0][1]
        }
        with disk.written_whole(path, sum(tensor.nbytes for tensor in tensors.values())) as aside:
            disk.write_safetensors(aside, tensors, {"images": json.dumps([image for image, _ in rows])})
        self.number += self.step
