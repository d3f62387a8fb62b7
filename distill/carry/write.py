"""The new LoRA as a file: kohya's names, fp16, and metadata that say what it, or a ControlNet, came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...koala.architecture.keys import tensors
from ...koala.architecture.layout import Layout
from ...koala.files.atomic_write import write_safetensors, written_whole
from ...koala.lora.kinds import ALPHA, BIAS
from ..errors import UserError
from .fit import Changes
from .student import DOWN, UP

CARRY_KEY = "koala.carry"
"""Metadata that says, as JSON, what a LoRA or ControlNet came from: files with SHA-256, settings, shares reached."""
KOHYA = {UP: ".lora_up.weight", DOWN: ".lora_down.weight"}
W_NORM = ".w_norm"


def rounded(changes: Changes) -> Changes:
    """The numbers as the file has them, fp32. Raises UserError for one that fp16 cannot hold."""
    found = {name: tensor.half().float() for name, tensor in changes.items()}
    if bad := next((name for name, tensor in found.items() if not tensor.isfinite().all()), None):
        raise UserError(
            f"the new LoRA was not written: {bad} has a number that fp16 cannot hold. Take --method fit, or a "
            f"weaker LoRA."
        )
    return found


def unet_tensors(changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """The U-Net's part: kohya's names with ComfyUI's numbers of the KOALA's blocks, which differ from SDXL's."""
    known = {tensor.diffusers: tensor for tensor in tensors(layout)}
    found: dict[str, Tensor] = {}
    for name, change in changes.items():
        end = next((end for end in KOHYA if name.endswith(end)), "")
        weight = known[name.removesuffix(end)]
        module, _, kind = weight.comfy.rpartition(".")
        key, number = f"lora_unet_{module.replace('.', '_')}", change.half()
        if end == UP:
            found[key + KOHYA[UP]] = number.reshape(*number.shape, *[1] * (len(weight.shape) - 2))
            found[key + ALPHA] = torch.tensor(float(number.shape[1]), dtype=torch.float16)
        elif end == DOWN:
            found[key + KOHYA[DOWN]] = number.reshape(-1, *weight.shape[1:])
        else:
            found[key + (W_NORM if kind == "weight" else BIAS)] = number
    return found


def write(path: Path, state: Mapping[str, Tensor], rank: int, origin: Mapping[str, Any]) -> None:
    """Write the LoRA; see ``write_file``."""
    metadata = {
        "ss_base_model_version": "koala",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        CARRY_KEY: json.dumps(origin),
    }
    write_file(path, state, metadata)


def write_file(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write any file, whole or not at all; raises UserError where that fails, or a file has the name."""
    try:
        with written_whole(path, sum(tensor.nbytes for tensor in state.values())) as aside:
            write_safetensors(aside, state, metadata)
    except OSError as error:
        raise UserError(f"--out: {error}") from None
