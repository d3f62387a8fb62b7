"""Checkpoints of a training run: complete or absent, never half written."""

from pathlib import Path
from typing import Any

import torch

from koala_sdxl.koala.files.atomic_write import written_whole


def save(state: Any, path: Path) -> None:
    """Replace the file at once: a reader, or a run that resumes, sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, replace=True) as aside:
        torch.save(state, aside)


def load(path: Path) -> Any:
    """Load what `save` wrote (tensors and plain containers only)."""
    return torch.load(path, map_location="cpu", weights_only=True)


def step_generator(seed: int, stage: int, step: int) -> torch.Generator:
    """The random numbers of one training step. They do not depend on earlier steps, so that a resumed run draws the
    same ones as an uninterrupted run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + stage * 100_000_007 + step)
