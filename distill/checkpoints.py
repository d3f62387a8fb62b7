"""Checkpoints of a run: written beside their place and renamed, resumed from the last, the oldest deleted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors import SafetensorError

from ..koala.files.atomic_write import replace_file
from . import footprint
from .average import Average
from .config import Config, TrainingTable
from .errors import UserError

MAY_CHANGE = {
    "training": {
        *("steps", "learning_rate", "final_rate", "warmup", "checkpoint_every", "keep"),
        *("ema_on_cpu", "compile", "tf32"),
    },
    "data": {"workers", "path", "cache"},
    "teacher": {"model", "tokenizer"},
    "validation": {"every", "judge", "clip", "best"},
    "log": None,
    "card": None,
    "output": None,
}
"""What may differ when a run is resumed: keys of a table, or None for a whole table."""
AVERAGE = "average.safetensors"
ORDER = "order.json"
"""Files of a checkpoint beside accelerate's own."""
BEGUN = "config.json"
"""The configuration with which a run began, in its output folder."""
BEST = "best.json"
"""Beside the checkpoints."""


class Order(BaseModel):
    """What decides, beside the configuration, which images a step sees."""

    model_config = ConfigDict(frozen=True)
    passes: PositiveInt
    """Forward passes of an optimiser step, those of all processes together."""
    data: str
    """``Index.digest`` of the data cache."""


class Best(BaseModel):
    """The best checkpoint in validation."""

    model_config = ConfigDict(frozen=True)
    step: int
    measure: str
    """The key ``validation.best``: by which it was chosen."""
    value: float


def best(folder: Path) -> Best | None:
    """The best checkpoint in a folder, as last written there; None where there is none."""
    try:
        found = Best.model_validate_json((folder / BEST).read_bytes())
    except FileNotFoundError:
        return None
    return found if _named(folder, found.step).is_dir() else None


def write_best(folder: Path, found: Best, keep: int) -> None:
    """Make a checkpoint the best one, which is kept; the one before it is then as any other. Raises SaveError."""
    replace_file(folder / BEST, found.model_dump_json())
    _prune(folder, keep)


def _named(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"


def existing(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def order(config: Config, processes: int, data: str, folder: Path, say: Callable[[str], None]) -> Order:
    """The order of a new run, or, where one is resumed, its order until now: the same images a step by whatever number
    of processes, in the same order.

    Raises UserError where that number does not divide them, and for checkpoints of another format.
    """
    table = config.training
    new = Order(passes=table.accumulate * processes, data=data)
    if not (checkpoints := existing(folder)):
        return new
    last = checkpoints[-1]
    try:
        begun = Order.model_validate_json((last / ORDER).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{last / ORDER} cannot be read ({_one_line(error)}); expected a checkpoint of this version. "
            f"Delete {last} to resume from the checkpoint before it, or choose another output folder."
        ) from None
    if begun.passes % processes:
        possible = ", ".join(str(number) for number in range(1, begun.passes + 1) if begun.passes % number == 0)
        raise UserError(
            f"{processes} processes cannot resume {last}: its steps are {begun.passes} batches of {table.batch}; "
            f"expected a number of processes that divides {begun.passes}: {possible}. Start so many, or choose another "
            f"output folder."
        )
    if begun.passes != new.passes:
        say(
            f"number of processes: {processes}, forward passes a step on each: {begun.passes // processes}. A step "
            f"stays at {begun.passes * table.batch} images, the same ones in the same order."
        )
    if begun.data != data:
        say(f"the data cache has changed since {last.name}: from here on the images come in another order.")
    return Order(passes=begun.passes, data=data)


def _one_line(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]


def resume(accelerator: Accelerator, folder: Path, average: Average | None, say: Callable[[str], None]) -> int:
    """Load the last checkpoint; returns the number of steps done. Raises UserError where it cannot be loaded."""
    checkpoints = existing(folder)
    if not checkpoints:
        return 0
    last = checkpoints[-1]
    try:
        accelerator.load_state(str(last))
        accelerator.step = 0  # its count of passes, which another number of processes makes differently
        if average:
            average.load(last / AVERAGE)
    except Exception as error:  # torch, pickle and safetensors each have their own
        raise UserError(
            f"{last} cannot be loaded ({error}); expected a checkpoint of this run. Delete that folder: the run then "
            f"resumes from the checkpoint before it."
        ) from None
    step = int(last.name.partition("-")[2])
    say(f"resuming from step {step}")
    return step


def save(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    table: TrainingTable,
    network: torch.nn.Module,
    average: Average | None,
    order: Order,
) -> None:
    """Write a checkpoint, then delete all but the last ``table.keep`` and the best one; called on every process.

    Raises UserError where it cannot be written, such as on a full disk; earlier ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = _named(folder, step)
    unfinished = folder / f".step-{step:07d}.partial"
    size = footprint.checkpoint_bytes(table, sum(parameter.numel() for parameter in network.parameters()))
    try:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            if (free := shutil.disk_usage(folder).free) < size:
                raise OSError(f"{size / 1e9:.2f} GB needed, {free / 1e9:.2f} free")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        if average:
            average.save(unfinished / AVERAGE, writes=accelerator.is_main_process)
        if accelerator.is_main_process:
            (unfinished / ORDER).write_text(order.model_dump_json())
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
        _prune(folder, table.keep)
    accelerator.wait_for_everyone()


def _prune(folder: Path, keep: int) -> None:
    kept = best(folder)
    for old in existing(folder)[:-keep]:
        if not (kept and old == _named(folder, kept.step)):
            shutil.rmtree(old)


def require_same_run(config: Config) -> None:
    """Write the configuration into the output folder, or check that the run there began with the same one.

    Raises UserError as ``require_comparable``.
    """
    path = config.output / BEGUN
    if not path.exists():
        replace_file(path, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    require_comparable(config)


def require_comparable(config: Config) -> None:
    """Check that a run in the output folder, if there is one, began with the same configuration.

    Raises UserError naming the first key that differs and is not in ``MAY_CHANGE``.
    """
    path = config.output / BEGUN
    now = config.model_dump(mode="json")
    if not path.exists():
        return
    begun = Config.model_validate_json(path.read_text("utf-8")).model_dump(mode="json")
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
