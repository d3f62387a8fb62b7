"""Small pictures with captions, written and described for the trainer."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from koala_sdxl.distill.config import DataTable


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
