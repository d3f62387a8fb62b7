"""An SDXL ControlNet in a file or folder: its layout, its weights tensor by tensor, and its other kinds, by name.

``host/transfer/control_file.py`` loads what ComfyUI loads; this is for learning with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..architecture.control_keys import control_tensors
from ..architecture.detection import read_control_layout
from ..architecture.keys import compare
from . import other_models
from .conventions import WEIGHT_NAMES, label
from .folder import present
from .header import CheckpointError, Header, read_header
from .unet_weights import UNetWeights

WANTED = "an SDXL ControlNet"
PREFIX = "control_model."
"""What the names of its tensors begin with in files of the original ControlNet's tools."""
LLLITE = "lllite_unet_"
KINDS = ("a ControlNet", "a union ControlNet", "a Control-LoRA", "a T2I-Adapter")
"""As ``other_models`` names them."""


@dataclass(frozen=True)
class ControlWeights(UNetWeights):
    """A ControlNet in a safetensors file; ``layout`` is that of a U-Net that it has the way down and the middle of."""


def control_file(path: Path) -> Path | None:
    """The weights of a ControlNet or its like in a file or a diffusers folder; None where there are none."""
    file = present(path, WEIGHT_NAMES) if path.is_dir() else path
    try:
        return file if file and _kind(read_header(file, WANTED)) else None
    except (CheckpointError, FileNotFoundError):
        return None


def open_control(file: Path) -> ControlWeights:
    """Open a ControlNet's file, under diffusers' names or ComfyUI's.

    Raises CheckpointError for a union ControlNet, Control-LoRA, T2I-Adapter or ControlNet-LLLite, for a ControlNet of
    another family of models, and for one that lacks tensors or has others.
    """
    header = read_header(file, WANTED)
    if (kind := _kind(header) or other_models.describe(header.shapes)) != KINDS[0]:
        raise CheckpointError(f"{label(file)} is {kind}; expected {WANTED}. Give another file.")
    prefix = PREFIX if any(key.startswith(PREFIX) for key in header.shapes) else ""
    found = {key.removeprefix(prefix): shape for key, shape in header.shapes.items()}
    try:
        layout, numbering = read_control_layout(found)
    except (KeyError, ValueError, IndexError):
        raise CheckpointError(
            f"{label(file)} is a ControlNet of another family of models; expected {WANTED}. Give another file."
        ) from None
    every = control_tensors(layout)
    cover = compare({getattr(tensor, numbering): tensor.shape for tensor in every}, found)
    if not cover.exact:
        raise CheckpointError(
            f"{label(file)} is a ControlNet with other tensors than those of SDXL's kind: {cover}; expected all of "
            f"them and no more. Give another file, or fetch it again."
        )
    names = {tensor.diffusers: prefix + getattr(tensor, numbering) for tensor in every}
    return ControlWeights(file, layout, names)


def _kind(header: Header) -> str | None:
    """Which kind of ControlNet a file is; None for what is none."""
    if any(key.startswith(LLLITE) for key in header.shapes):
        return "a ControlNet-LLLite"
    kind = other_models.recognise(header.shapes, header.under(header.unet_prefix))
    return kind.name if kind and kind.name in KINDS else None
