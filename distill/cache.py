"""Latents and texts of a data set, computed once: safetensors shards of one bucket each, and an index.

``build_cache`` writes what is read here.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ..koala.files.unfinished import PATTERN
from . import sources
from .buckets import Size, Turn
from .config import DataTable
from .errors import UserError
from .processes import LOCK

INDEX = "index.json"
FORMAT = 3
TOKENS = 77
"""That SDXL's text encoders take, the start and the end of a caption included."""
OPEN = 4096
"""Most shards that a process keeps open; a system allows it some ten thousands of mapped files."""
POOR_JPEG = 75
"""Pillow's default quality, and so that of tools which write images again without being asked to."""
SETTINGS = (
    *("kind", "image", "caption", "caption_lines", "texts"),
    *("resolution", "bucket_step", "max_aspect", "upscale", "min_side", "max_image_aspect", "crop"),
)
"""Keys of the table data that change what is cached, beside the path."""
OF_TEXTS = {"embeddings": ("context", "pooled"), "tokens": ("tokens",)}
"""``data.texts`` -> what is cached of a caption."""
OF_CAPTIONS = ("context", "pooled", "tokens", "lengths")
"""Tensors with a row for each caption; the others have one for each image."""


class Shard(BaseModel):
    """One file of the cache, of ``count`` images of one size.

    For each image latents (fp16), ids, jpeg, and captions, the number of these (int32); for each caption context and
    pooled (fp16) or tokens (int32), and lengths (int32). Its metadata name the images as ``Entry.digest`` does, so that
    a file explains itself.
    """

    model_config = ConfigDict(frozen=True)
    file: str
    bucket: Size
    count: PositiveInt
    unused: tuple[int, ...] = ()
    """Rows, ascending, whose image is no longer in the source, or is another one now."""

    @property
    def used(self) -> int:
        return self.count - len(self.unused)

    def row(self, number: int) -> int:
        """The row of the used sample with this number."""
        for unused in self.unused:
            number += unused <= number
        return number


class Index(BaseModel):
    """The content of index.json. It is written before the first shard, and again when all are there."""

    model_config = ConfigDict(frozen=True)
    identity: dict[str, Any]
    """What the cache was computed from, beside the images; a run with another identity cannot use it."""
    listing: str = ""
    """``sources.listing`` of the images; empty until all are cached."""
    samples: int = 0
    skipped: int = 0
    """Number of images that were left out, and of shards, lines and kinds of files that could not be read."""
    left_out: dict[str, int] = {}
    """The same by reason."""
    shards: tuple[Shard, ...] = ()
    problems: tuple[str, ...] = ()
    """The reasons for the first ``build_cache.LISTED`` of them."""
    captions: int = 0
    """At least as many as samples."""
    long_captions: int = 0
    longest_caption: int = 0
    """Captions of more than ``TOKENS``, and the tokens of the longest caption."""
    jpegs: int = 0
    poor_jpegs: int = 0
    """Images that were JPEGs, and those whose quality was at most ``POOR_JPEG``."""

    @property
    def digest(self) -> str:
        """The same for caches with the same images in the same order."""
        content = self.model_dump_json(include={"identity", "listing", "shards"})
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def full_identity(data: DataTable, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything on which a cache depends, as JSON reads it back; ``identity`` is that of the teacher."""
    settings = {f"data.{name}": getattr(data, name) for name in SETTINGS}
    path = {"data.path": data.path.resolve().as_posix()}  # the same whichever folder a run is started in
    return json.loads(json.dumps({"format": FORMAT, **path, **settings, **identity}))


class _Opened(NamedTuple):
    """A shard that has been read from."""

    file: Any
    first: np.ndarray
    """The row of each image's first caption, and where the last image's end."""


@dataclass
class Cache(Dataset[dict[str, torch.Tensor]]):
    """A cache on disk as a dataset. Each process maps a shard into memory when it first reads from it."""

    folder: Path
    index: Index
    _ends: list[int] = field(init=False, repr=False)
    _opened: dict[int, _Opened] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = list(accumulate(shard.used for shard in self.index.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """A sample with the first of its captions; see ``sample``."""
        return self.sample(number, 0)

    def sample(self, number: int, caption: int) -> dict[str, torch.Tensor]:
        """A sample with the caption of this number.

        float32 tensors: latents [4, h, w], ids [6] (SDXL's sizes: original height and width, crop top and left, height
        and width), and either context [77, c] and pooled [p], or tokens, int64 [2, 77], for ``texts.TextEncoders``.
        Raises UserError where the shard is damaged.
        """
        opened, row = self._place(number)
        texts = OF_TEXTS[self.index.identity["data.texts"]]
        rows = dict.fromkeys(("latents", "ids"), row) | dict.fromkeys(texts, int(opened.first[row]) + caption)
        found = {name: opened.file.get_slice(name)[place] for name, place in rows.items()}
        return {name: value.long() if name == "tokens" else value.float() for name, value in found.items()}

    def captions(self, number: int) -> int:
        """How many captions a sample has."""
        opened, row = self._place(number)
        return int(opened.first[row + 1] - opened.first[row])

    def _place(self, number: int) -> tuple[_Opened, int]:
        """The shard that holds a sample, and its row there."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = bisect_right(self._ends, number)
        shard = self.index.shards[which]
        if which not in self._opened:
            file = self._open(shard)
            counts = file.get_tensor("captions").numpy()
            if len(self._opened) == OPEN:
                del self._opened[next(iter(self._opened))]  # the one opened first
            self._opened[which] = _Opened(file, np.concatenate([[0], np.cumsum(counts)]))
        return self._opened[which], shard.row(number - self._ends[which] + shard.used)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which cannot be sent to another process."""
        return self.__dict__ | {"_opened": {}}

    @property
    def bucket_of(self) -> list[int]:
        """The bucket of each sample, as a number; samples with the same number have the same size."""
        sizes = sorted({shard.bucket for shard in self.index.shards})
        return [sizes.index(shard.bucket) for shard in self.index.shards for _ in range(shard.used)]

    def check(self) -> None:
        """Open every shard once. Raises UserError for the first that is missing, cut short or of another length."""
        for shard in self.index.shards:
            self._open(shard)

    def remarks(self) -> list[str]:
        """What is worth knowing of the images before training, one line each."""
        index, lines = self.index, []
        if index.long_captions:
            lines.append(
                f"{index.long_captions} of {index.captions} captions have more than {TOKENS} tokens, the longest "
                f"{index.longest_caption}: the text encoders read the first {TOKENS}, start and end included."
            )
        if 2 * index.poor_jpegs > index.samples:
            lines.append(
                f"{index.poor_jpegs} of {index.samples} images are JPEGs of quality {POOR_JPEG} or less: a tool may "
                f"have compressed them again, as datasets.map does (distill/README.md, Data)."
            )
        return lines

    def _open(self, shard: Shard) -> Any:
        opened, rows = opened_shard(self.folder / shard.file)
        if rows != shard.count:
            raise damaged(self.folder / shard.file, f"{rows} samples, not {shard.count}")
        return opened


@dataclass(frozen=True)
class Learned(Dataset[dict[str, torch.Tensor]]):
    """The samples to learn from, of a cache; each with another of its captions in every epoch."""

    samples: Cache
    indices: Sequence[int]
    seed: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, turn: Turn) -> dict[str, torch.Tensor]:
        """The sample in this place, with this epoch's caption; see ``Cache.sample``."""
        number = self.indices[turn.place]
        return self.samples.sample(number, caption_of(self.seed, number, turn.epoch, self.samples.captions(number)))


def caption_of(seed: int, number: int, epoch: int, captions: int) -> int:
    """Which of its captions a sample has in an epoch: each of n once in n epochs, in an order of its own."""
    if captions == 1:
        return 0
    turn, place = divmod(epoch, captions)
    return int(np.random.default_rng((seed % 2**64, number, turn)).permutation(captions)[place])


def opened_shard(path: Path) -> tuple[Any, int]:
    """A shard's open file, and its number of rows. Raises UserError where it is damaged or missing."""
    try:
        opened = safe_open(path, framework="pt")
        return opened, opened.get_slice("latents").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from None


def damaged(path: Path, fault: str) -> UserError:
    """The error for a shard that cannot be read."""
    return UserError(
        f"{path} is damaged ({fault}); expected a shard of the data cache. Delete this file and run again: its images "
        f"are then encoded again."
    )


def ready(data: DataTable, identity: Mapping[str, Any]) -> Cache | None:
    """The cache in ``data.cache`` with all images of ``data.path``; None where there is none yet, some are missing or
    have changed since. Where nothing is left at ``data.path``, the cache is taken as it is.

    Raises UserError as ``existing`` and ``sources.listing`` do.
    """
    cache = existing(data, identity)
    return cache if cache and (sources.is_gone(data) or cache.index.listing == sources.listing(data)) else None


def existing(data: DataTable, identity: Mapping[str, Any]) -> Cache | None:
    """The cache in ``data.cache`` as it was when it was last complete; None where it never was, or lacks a shard.

    Raises UserError where it is damaged or was computed from something else, or the folder holds something else.
    """
    index = read_index(data, identity)
    if index is None or not index.listing:
        return None
    cache = Cache(data.cache.resolve(), index)
    if not all((cache.folder / shard.file).exists() for shard in index.shards):
        return None
    cache.check()
    return cache


def read_index(data: DataTable, identity: Mapping[str, Any]) -> Index | None:
    """The index in ``data.cache``, of a complete cache or not; None for an empty folder or none. Raises UserError as
    ``existing`` does."""
    folder = data.cache.resolve()
    advice = "Choose another folder as data.cache, or delete this one."
    try:
        content = (folder / INDEX).read_bytes()
    except FileNotFoundError:
        if folder.is_dir() and any(path.name != LOCK and not path.match(PATTERN) for path in folder.iterdir()):
            raise UserError(
                f"data.cache {folder} is a folder with other files and no {INDEX}; expected a data cache, an empty "
                f"folder or none. {advice}"
            ) from None
        return None
    except OSError as error:
        raise UserError(
            f"{folder / INDEX} cannot be read ({error.strerror}); expected a data cache. {advice}"
        ) from None
    try:
        index = Index.model_validate_json(content)
    except ValidationError:
        raise UserError(
            f"{folder / INDEX} is damaged, or not the index of a data cache; expected one. {advice}"
        ) from None
    wanted = full_identity(data, identity)
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
    return index
