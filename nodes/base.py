"""What all nodes share: their place in the menu, and what is shown on a node after it ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..host.model import WEIGHT_DTYPES

CATEGORY = "KOALA"
DRAWING = "koala"
"""Under this name a node's output for the canvas holds what web/ draws on the node."""


SHOWS: dict[str, Any] = (
    {"has_intermediate_output": True} if "has_intermediate_output" in io.Schema.__dataclass_fields__ else {}
)
"""For the schema of a node that is shown something: a host that can (0.19 on) sends it again when the node's result
comes from its cache."""


def shown(text: str, *outputs: object, **drawing: object) -> io.NodeOutput:
    """The node's outputs together with what the canvas shows on it: ``text`` (also in the run's history), and
    ``badge``, ``curve`` or ``coverage``, which web/lib/drawings.mjs draws."""
    seen: dict[str, object] = {"text": (text,)} if text else {}
    return io.NodeOutput(*outputs, ui={**seen, DRAWING: (drawing,)})


def unet_input(**further: Any) -> io.Combo.Input:
    """The choice of a KOALA U-Net's file."""
    return io.Combo.Input(
        "unet_name",
        options=folder_paths.get_filename_list("diffusion_models"),
        tooltip="KOALA's U-Net alone, as published in unet/, from models/diffusion_models.",
        **further,
    )


def weight_dtype_input() -> io.Combo.Input:
    """The choice of the type in which a U-Net's weights are kept."""
    return io.Combo.Input(
        "weight_dtype",
        options=list(WEIGHT_DTYPES),
        default="default",
        advanced=True,
        tooltip="Type in which the U-Net's weights are kept. default: as ComfyUI chooses for this device.",
    )


def fingerprint(*paths: Path) -> str:
    """Changes when a file is replaced on disk under the same name."""
    stats = [path.stat() for path in paths if path.exists()]
    return ";".join(f"{stat.st_mtime_ns}:{stat.st_size}" for stat in stats)
