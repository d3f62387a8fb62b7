"""An SDXL ControlNet's file -> a CONTROL_NET that fits KOALA."""

from __future__ import annotations

from pathlib import Path

import comfy.controlnet

from ...koala.files.conventions import label
from ...koala.files.header import CheckpointError, Source, read_header
from ...koala.files.other_models import describe
from ..protocols import ControlNet
from ..reader import read
from .control import adapt

WANTED = "an SDXL ControlNet or T2I-Adapter"


def load_control(path: Path) -> ControlNet:
    """The ControlNet of a safetensors file, its residuals as the KOALA that is sampled with it takes them.

    Raises FileNotFoundError, CheckpointError for a file that holds no ControlNet, and ValueError for a ControlNet that
    was not made for SDXL.
    """
    header = read_header(path, WANTED)
    found = describe(header.shapes)
    try:
        control = comfy.controlnet.load_controlnet_state_dict(read(Source(header)))
    except (KeyError, RuntimeError, TypeError) as error:  # a network that the host begins to build and cannot fill
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{label(path)} is {found}, and ComfyUI cannot build a ControlNet of it ({why}); expected {WANTED}. "
            f"Choose another file in control_net_name."
        ) from error
    if control is None:
        raise CheckpointError(f"{label(path)} is {found}; expected {WANTED}. Choose another file in control_net_name.")
    return adapt(control)
