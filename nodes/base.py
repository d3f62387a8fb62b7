"""What the nodes share: their place in the menu, common inputs, and what is shown on a node after it ran."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from .. import koala_loader
from ..host.model import WEIGHT_DTYPES
from ..koala.files import stamp
from ..koala.files.folder import folder_files
from ..koala.words import Message, data

CATEGORY = "KOALA"
ADD_ONS = f"{CATEGORY}/SDXL add-ons"
DRAWING = "koala"
"""Key of a node's output for the canvas that holds what web/ draws on the node."""

BUILT_IN = {
    ("loras", "built-in koala-tiny-cyan"): koala_loader.BUILT_IN.with_name("koala-tiny-cyan.safetensors"),
    ("controlnet", "built-in koala-tiny-outline"): koala_loader.BUILT_IN.with_name("koala-tiny-outline.safetensors"),
}
"""koala-tiny's add-ons, which are part of the pack: ComfyUI's folder key and the name that inputs offer -> file."""

SHOWS: dict[str, Any] = (
    {"has_intermediate_output": True} if "has_intermediate_output" in io.Schema.__dataclass_fields__ else {}
)
"""Schema options of a node that shows something: hosts from 0.19 on send it again when the result comes from the
cache."""


def shown(text: Message | None, *outputs: object, **drawing: object) -> io.NodeOutput:
    """The node's outputs together with what the canvas shows on it: ``text`` (in English also in the run's history),
    and ``badge``, ``curve`` or ``coverage``, which web/lib/drawings.mjs draws. Messages are shown in its language.
    No text: None."""
    texts: dict[str, object] = {"text": (str(text),)} if text else {}
    drawn = data({"text": text, **drawing} if text else drawing)
    return io.NodeOutput(*outputs, ui={**texts, DRAWING: (drawn,)})


def unet_input(**further: Any) -> io.Combo.Input:
    """The choice of a KOALA U-Net file."""
    return io.Combo.Input(
        "unet_name",
        options=folder_paths.get_filename_list("diffusion_models"),
        tooltip="A file with KOALA's U-Net alone, as published in unet/, from models/diffusion_models.",
        **further,
    )


def weight_dtype_input() -> io.Combo.Input:
    """The choice of the data type of a U-Net's weights in memory."""
    return io.Combo.Input(
        "weight_dtype",
        options=list(WEIGHT_DTYPES),
        default="default",
        advanced=True,
        tooltip="Data type of the U-Net's weights in memory. default: ComfyUI's choice for this device.",
    )


def choices(folder: str) -> list[str]:
    """What an input offers of ComfyUI's folder key ``folder``: the files there, and the pack's own for koala-tiny.

    These come last, so that none is the default where there are others.
    """
    return [*folder_paths.get_filename_list(folder), *(name for key, name in BUILT_IN if key == folder)]


def chosen_path(folder: str, name: str) -> Path:
    """The path of one of the ``choices``. Raises FileNotFoundError, naming the folder key, where it is not there."""
    return BUILT_IN.get((folder, name)) or Path(folder_paths.get_full_path_or_raise(folder, name))


def paths_of(folder: str, name: str) -> list[Path]:
    """The path of one of the ``choices``; empty where it does not exist."""
    path = BUILT_IN.get((folder, name)) or (folder_paths.get_full_path(folder, name) if name else None)
    return [Path(path)] if path else []


def fingerprint(*paths: Path) -> str:
    """Changes when a file, or a file that is read of a diffusers folder, is changed on disk under the same name."""
    return stamp.fingerprint(file for path in paths for file in _files(path))


def _files(path: Path) -> Iterable[Path]:
    return folder_files(path).values() if path.is_dir() else (path,)
