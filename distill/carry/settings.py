"""What a LoRA is carried over with: the files and numbers of the command line, and the constants behind them."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ...koala.releases import BASE
from ..errors import UserError

HELD_OUT = 4
"""Of so many prompts one is held out, and there is one held-out sample for so many that are learned from."""
PER_DRAWING = 12
"""Samples of either network for each time that it samples a prompt, where there are as many steps."""
FITTED = 96
"""Samples that least squares learn from at most, as each costs them fifty forward passes or more; further training,
which costs each a few, learns from all."""
PER_STEP = 8
"""Samples in an optimiser step, in as many forward passes as memory asks for."""
CHECKPOINT_EVERY = 25
"""Optimiser steps."""
LEAST_RANK = 16


@dataclass(frozen=True)
class Settings:
    """The command line; see ``options``."""

    lora: Path
    teacher: Path
    student: Path
    prompts: Path
    out: Path
    keep: Path | None = None
    hints: Path | None = None
    method: Literal["fit", "refit"] = "refit"
    rank: int | None = None
    size: int = 1024
    draw_steps: int = BASE.settings.steps
    cfg: float = BASE.settings.cfg
    spacing: Literal["leading", "trailing"] = "leading"
    samples: int = 1024
    steps: int = 300
    batch: int = 8
    seed: int = 0
    dtype: Literal["bf16", "fp16", "fp32"] = "fp16"
    tokenizer: Path | None = None
    check: bool = False

    @property
    def guided(self) -> bool:
        """Whether images are drawn with guidance: two forward passes a step, one of them with the empty prompt."""
        return self.cfg > 1

    @property
    def per_prompt(self) -> int:
        """Samples for each time that a prompt is sampled, half of them of either network."""
        return 2 * min(PER_DRAWING, self.draw_steps)

    @property
    def held_out(self) -> int:
        """How many samples are held out, beside those that are learned from."""
        return max(4, self.samples // HELD_OUT)

    @property
    def work(self) -> Path:
        """The folder of what an interrupted run has done, beside the output."""
        return self.out.with_name(f"{self.out.stem}.carry")


def settings(given: Namespace) -> Settings:
    """The command line's; what it does not say has its default."""
    names = [field.name for field in fields(Settings)]
    return Settings(**{name: value for name in names if (value := getattr(given, name, None)) is not None})


def require_output(out: Path) -> None:
    """Raises UserError for an output that is there already, or whose name or folder will not do."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out: {out}: expected a name that ends in .safetensors. Change it.")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: {out} is there already, and was left as it is; expected a new file. Change the name.")
    if not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is not a folder; expected one to write {out.name} to. Make it first.")


def read_prompts(path: Path, option: str, least: int) -> dict[int, str]:
    """The lines of a text file that are not empty, by their numbers from 1. Raises UserError where it cannot be read or
    has too few."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{option}: {path} cannot be read ({why}); expected a text file, one prompt a line.") from None
    found = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if len(found) < least:
        raise UserError(
            f"{option}: {path} has {len(found)} prompts; expected at least {least}, one a line. Add some: every "
            f"{HELD_OUT}th is held out, to measure."
        )
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def origin(given: Settings, models: Mapping[str, list[Path]], sha256: Callable[[Path], str]) -> dict[str, Any]:
    """What a result depends on: name and SHA-256 of each file, and the numbers. Not the batch: it changes rounding
    alone, and an unfinished run goes on with another.

    Args:
        given: the command line.
        models: option -> the files that are read, weights first; the others are named with their folder.
        sha256: of a file.
    """
    files = {"prompts": [given.prompts], **({"keep": [given.keep]} if given.keep else {}), **models}
    numbers = ("method", "rank", "size", "draw_steps", "cfg", "spacing", "samples", "steps", "seed", "dtype")

    def told(name: str, first: Path, *others: Path) -> dict[str, Any]:
        beside = {f"{path.parent.name}/{path.name}": sha256(path) for path in others}
        return {"name": name, "sha256": sha256(first), **({"beside": beside} if beside else {})}

    return {
        **{option: told(getattr(given, option, given.lora).name, *paths) for option, paths in files.items()},
        "settings": {name: getattr(given, name) for name in numbers},
    }
