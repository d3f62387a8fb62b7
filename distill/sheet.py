"""Contact sheets: many images in one PNG."""

from pathlib import Path

import torch
from PIL import Image


def save(images: torch.Tensor, columns: int, path: Path) -> None:
    """Write images, float [n, 3, s, s] in [-1, 1], row by row; an incomplete last row is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [torch.cat(list(row), dim=-1) for row in images.split(columns) if len(row) == columns]
    levels = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255).byte()
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(path, optimize=True)
