"""The new LoRA as a file: kohya's names, fp16, and metadata that say what it, or a ControlNet, came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...koala.files.atomic_write import write_safetensors, written_whole
from ...koala.files.conventions import CARRY_KEY
from ...koala.lora import factors
from ...koala.lora.fit import Changes
from ..errors import UserError


def rounded(changes: Changes) -> Changes:
    """The numbers as the file has them, fp32. Raises UserError for one that fp16 cannot hold."""
    try:
        return factors.rounded(changes)
    except ValueError as error:
        raise UserError(f"{error} Or take --method fit. No file was written.") from None


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
