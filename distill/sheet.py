"""Many pictures in one PNG."""

from pathlib import Path

import torch
from PIL import Image


def save(pictures: torch.Tensor, columns: int, path: Path) -> None:
    """pictures: float [n, 3, S, S] in [-1, 1], row by row; a last row that is not full is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [torch.cat(list(row), dim=-1) for row in pictures.split(columns) if len(row) == columns]
    levels = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255).byte()
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(path, optimize=True)
