"""Small pictures with captions, written and described for the trainer, and what encodes them at no cost."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from koala_sdxl.distill import build_cache, cache, sources
from koala_sdxl.distill.config import DataTable
from koala_sdxl.distill.errors import UserError

IDENTITY = {"teacher.model": "sdxl"}
"""Of ``Averages``."""


def picture(width: int = 64, height: int = 64, colour: Any = (200, 40, 40), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)


def noise(width: int = 64, height: int = 64) -> Image.Image:
    """One that compresses badly, so that a cut is a loss."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def table(path: Path, **settings: Any) -> DataTable:
    """A configuration for small pictures."""
    given = {"path": path, "cache": path.parent / "cache", "resolution": 64, "bucket_step": 16}
    return DataTable.model_validate(given | settings)


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files of these names below a folder, and return the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar(path: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write a tar file with files of these names, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            raw = content.encode() if isinstance(content, str) else content
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


class Averages:
    """An encoder that averages over cells, and counts its calls."""

    def __init__(self, fail_after: int = 10**9, spoil: Callable[[torch.Tensor], None] | None = None) -> None:
        self.pictures = 0
        self.captions: list[str] = []
        self.fail_after = fail_after
        self.spoil = spoil

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        self.pictures += len(pictures)
        if self.pictures > self.fail_after:
            raise RuntimeError("out of memory")
        cells = torch.nn.functional.avg_pool2d(pictures, 8)
        found = torch.cat([cells, cells.mean(1, keepdim=True)], 1)
        if self.spoil:
            self.spoil(found)
        return found

    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self.captions += captions
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return lengths[:, None, None].expand(-1, 77, 6), lengths[:, None].expand(-1, 5) / 2

    def tokens(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([[[len(caption)] * 77, [0] * 77] for caption in captions])

    def lengths(self, captions: list[str]) -> list[int]:
        return [2 + len(caption.split()) for caption in captions]


def folder_of(path: Path, sizes: Sequence[tuple[int, int]], captions: Sequence[str]) -> Path:
    """A folder with a picture of each size."""
    files: dict[str, bytes | str] = {}
    for number, (size, caption) in enumerate(zip(sizes, captions, strict=True)):
        files |= {f"{number:03}.png": encoded(picture(*size, (number, 0, 0))), f"{number:03}.txt": caption}
    return write(path, files)


def built(
    data: DataTable, encoder: build_cache.Encoder | None, **identity: str
) -> tuple[cache.Cache, list[str], list[str]]:
    """A cache, built or found, with the lines said and the pictures reported."""
    said: list[str] = []
    reported: list[str] = []
    return build_cache.build(data, encoder, IDENTITY | identity, said.append, reported.append), said, reported


def read(data: DataTable) -> tuple[dict[str, str], list[str]]:
    """The only caption by key, in order, and the lines reported."""
    lines: list[str] = []
    samples = list(sources.read(data, lines.append))
    assert all(sample.image.mode == "RGB" for sample in samples)
    return {sample.key: sample.captions[0] for sample in samples if len(sample.captions) == 1}, lines


def refused(data: DataTable) -> str:
    """What is said of a source that cannot be read."""
    with pytest.raises(UserError) as problem:
        read(data)
    return str(problem.value)
