"""Latents and text embeddings of a data set, computed once: safetensors shards of one bucket each, and an index.

``build_cache`` writes what is read here.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from .buckets import Size
from .config import DataTable
from .errors import UserError

INDEX = "index.json"
FORMAT = 1
SETTINGS = ("kind", "image", "caption", "resolution", "bucket_step", "max_aspect", "upscale", "crop")
"""Keys of the table data that change what is cached, beside the path."""


class Shard(BaseModel):
    """One file of the cache: tensors latents, context, pooled (fp16) and ids (int32), ``count`` rows each."""

    model_config = ConfigDict(frozen=True)
    file: str
    bucket: Size
    count: PositiveInt


class Index(BaseModel):
    """The content of index.json. It is written last: a folder without it is not a cache."""

    model_config = ConfigDict(frozen=True)
    identity: dict[str, Any]
    """What the cache was computed from; a run with another identity cannot use it."""
    samples: int
    skipped: int
    """Number of images that were left out, and of shards or lines that could not be read."""
    shards: tuple[Shard, ...] = Field(min_length=1)
    problems: tuple[str, ...]
    """The reasons for the first ``build_cache.LISTED`` of them."""


def full_identity(data: DataTable, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything on which a cache depends, as JSON reads it back; ``identity`` is that of the teacher."""
    settings = {f"data.{name}": getattr(data, name) for name in SETTINGS}
    path = {"data.path": data.path.resolve().as_posix()}  # the same whichever folder a run is started in
    return json.loads(json.dumps({"format": FORMAT, **path, **settings, **identity}))


@dataclass
class Cache(Dataset[dict[str, torch.Tensor]]):
    """A cache on disk as a dataset. Each process maps a shard into memory when it first reads from it."""

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
        """Without the open files, which cannot be sent to another process."""
        return self.__dict__ | {"_opened": {}}

    @property
    def bucket_of(self) -> list[int]:
        """The bucket of each sample, as a number; samples with the same number have the same size."""
        sizes = sorted({shard.bucket for shard in self.index.shards})
        return [sizes.index(shard.bucket) for shard in self.index.shards for _ in range(shard.count)]

    def check(self) -> None:
        """Open every shard once. Raises UserError for the first that is missing, cut short or of another length."""
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

    def _damaged(self, path: Path, fault: str) -> UserError:
        return UserError(
            f"{path} is damaged ({fault}); expected a shard of the data cache. Delete the folder {self.folder} and run "
            f"again: the cache is then computed again."
        )


def ready(data: DataTable, identity: Mapping[str, Any]) -> Cache | None:
    """The complete cache in ``data.cache``; None where there is none yet.

    Raises UserError where it is damaged or was computed from something else, or the folder holds something else.
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
    cache = Cache(folder, index)
    cache.check()
    return cache
