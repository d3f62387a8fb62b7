"""The U-Net of SDXL, or of a model cut out of it, in a file or folder: its layout, and its weights tensor by tensor.

``inspect`` is for what the nodes load, which is KOALA alone; this is for distilling and comparing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..architecture.detection import find_layout
from ..architecture.keys import coverage, names
from ..architecture.layout import Layout
from . import other_models
from .conventions import WEIGHT_NAMES, label
from .header import CheckpointError, read_header


@dataclass(frozen=True)
class UNetWeights:
    """A U-Net in a safetensors file, which is mapped into memory when the first tensor is read."""

    path: Path
    layout: Layout
    names: Mapping[str, str]
    """diffusers' name of a tensor -> its name in the file."""

    @cached_property
    def _file(self) -> Any:
        return safe_open(self.path, framework="pt")

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor with this diffusers name, in the file's type, on the CPU."""
        tensor: torch.Tensor = self._file.get_tensor(self.names[name])
        return tensor

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Every tensor in this type, on the CPU, by diffusers' names."""
        return {name: self.tensor(name).to(dtype) for name in self.names}


def open_unet(path: Path, wanted: str) -> UNetWeights:
    """Open the U-Net in a file, alone or inside a checkpoint, under any names, or in a Hugging Face folder.

    Args:
        path: a .safetensors file or a folder.
        wanted: what an error says was expected, such as "SDXL".

    Raises CheckpointError where there is no such U-Net, or one that lacks tensors.
    """
    file = _unet_file(path, wanted)
    try:
        header = read_header(file, f"{wanted} weights")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); expected {wanted}'s U-Net. Give a .safetensors file or a "
            f"Hugging Face folder."
        ) from None
    prefix = header.unet_prefix
    found = header.under(prefix)
    read = find_layout(found)
    if read is None:
        raise CheckpointError(
            f"{label(file)} is {other_models.describe(header.shapes)}; expected {wanted}'s U-Net. Give another file."
        )
    layout, numbering = read
    cover = coverage(layout, numbering, found)  # tensors beside the U-Net's do no harm
    if faults := (*cover.missing, *cover.misshapen):
        raise CheckpointError(
            f"{label(file)} is {other_models.describe(header.shapes)} with tensors missing or of another shape "
            f"({len(faults)}, first: {faults[0]}); expected every tensor of {wanted}'s U-Net. Fetch the file again."
        )
    stored = (prefix + name for name in names(layout, numbering))
    return UNetWeights(file, layout, dict(zip(names(layout, "diffusers"), stored, strict=True)))


def _unet_file(path: Path, wanted: str) -> Path:
    """The weights file of a folder's U-Net; a file is returned unchanged."""
    if not path.is_dir():
        return path
    for file in (folder / name for folder in (path / "unet", path) for name in WEIGHT_NAMES):
        if file.is_file():
            return file
    raise CheckpointError(
        f"{path} holds no unet/{WEIGHT_NAMES[0]} and no unet/{WEIGHT_NAMES[1]}; expected {wanted}'s U-Net. Give a "
        f".safetensors file, or a Hugging Face folder with one of these."
    )
