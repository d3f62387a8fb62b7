"""Checkpoints of a run: written beside their place and renamed, resumed from the last, the oldest deleted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ..koala.files.atomic_write import replace_file
from .config import Config
from .errors import UserError

MAY_CHANGE = {
    "training": {"steps", "learning_rate", "final_rate", "warmup", "checkpoint_every", "keep"},
    "data": {"workers", "path", "cache"},
    "teacher": {"model", "tokenizer"},
    "log": None,
    "output": None,
}
"""What may differ when a run is resumed: keys of a table, or None for a whole table."""
BYTES_PER_WEIGHT = 16
"""Of a checkpoint: weights, AdamW's two moments and the average, fp32."""


def existing(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def resume(accelerator: Accelerator, folder: Path, say: Callable[[str], None]) -> int:
    """Load the last checkpoint; returns the number of steps done. Raises UserError where it cannot be loaded."""
    checkpoints = existing(folder)
    if not checkpoints:
        return 0
    last = checkpoints[-1]
    try:
        accelerator.load_state(str(last))
    except Exception as error:  # torch, pickle and safetensors each have their own
        raise UserError(
            f"{last} cannot be loaded ({error}); expected a checkpoint of this run. Delete that folder: the run then "
            f"resumes from the checkpoint before it."
        ) from None
    step = int(last.name.partition("-")[2])
    say(f"resuming from step {step}")
    return step


def save(accelerator: Accelerator, folder: Path, step: int, keep: int, network: torch.nn.Module) -> None:
    """Write a checkpoint, then delete all but the last ``keep``; called on every process.

    Raises UserError where it cannot be written, such as on a full disk; earlier ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:07d}"
    unfinished = folder / f".step-{step:07d}.partial"
    size = BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in network.parameters())
    try:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            if (free := shutil.disk_usage(folder).free) < size:
                raise OSError(f"{size / 1e9:.2f} GB needed, {free / 1e9:.2f} free")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        earlier = existing(folder)
        raise UserError(
            f"{target} could not be written: {error}. "
            f"{f'The last checkpoint is {earlier[-1]}.' if earlier else 'There is no earlier one.'} Free space and run "
            f"again."
        ) from None
    if accelerator.is_main_process:
        for old in existing(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def require_same_run(config: Config) -> None:
    """Write the configuration into the output folder, or check that the run there began with the same one.

    Raises UserError naming the first key that differs and is not in ``MAY_CHANGE``.
    """
    path = config.output / "config.json"
    now = config.model_dump(mode="json")
    if not path.exists():
        replace_file(path, json.dumps(now, indent=2) + "\n")  # by every process; none may see half of it
        return
    begun = json.loads(path.read_text("utf-8"))
    for table, values in now.items():
        free = MAY_CHANGE.get(table, set())
        if free is None:
            continue
        for key in values:
            if key not in free and begun[table].get(key) != values[key]:
                raise UserError(
                    f"{config.output} holds a run with {table}.{key} = {begun[table].get(key)!r}; now it is "
                    f"{values[key]!r}. Choose another output folder, or change it back to resume that run."
                )
