"""What is measured of the sample images: their CLIP score, and whatever a command of one's own prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from .config import Config
from .errors import UserError

CLIP_SCORE = "clip_score"
OWN = ("step", "loss", CLIP_SCORE)
"""Names that a judge's numbers cannot have."""
OF_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables by which a judge that uses accelerate would wait for this run's other processes."""
AT_ONCE = 16
"""Images that CLIP sees together."""


@dataclass(frozen=True)
class Judge:
    """A command that is given the folder of the images as its last argument, and prints a number or a JSON object of
    numbers as its last line."""

    command: tuple[str, ...]

    def __call__(self, folder: Path) -> dict[str, float]:
        """Its numbers by name; a single one is called ``judge``. Raises UserError where it fails or prints none."""
        try:
            done = subprocess.run(
                [*self.command, str(folder)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                env={name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS},
                check=False,
            )
        except OSError as error:
            raise self._fault(str(error)) from None
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise self._fault(f"it ended with status {done.returncode}{f': {last[0]}' if last else ''}")
        line = (done.stdout.strip().splitlines() or [""])[-1]
        try:
            said = json.loads(line)
        except ValueError:
            raise self._fault(f"it printed {line!r} last") from None
        found = said if isinstance(said, dict) else {"judge": said}
        if bad := [name for name, value in found.items() if type(value) not in (int, float) or name in OWN]:
            raise self._fault(f"it printed {bad[0]} = {found[bad[0]]!r}")
        return {name: float(value) for name, value in found.items()}

    def _fault(self, why: str) -> UserError:
        return UserError(
            f"validation.judge: {' '.join(self.command)} has failed ({why}); expected a number or a JSON object of "
            f"numbers as its last line, with names other than {', '.join(OWN)}."
        )


class ClipScore:
    """100 x the cosine between an image and its prompt, at least 0, and the mean of it, as in torchmetrics' CLIPScore.

    A higher score says that images show more of what their prompts ask for (Hessel et al., arXiv 2104.08718).
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """``folder`` is a CLIP model as transformers saves one. Raises UserError where it cannot be loaded."""
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"validation.clip: {folder} cannot be loaded ({str(error).splitlines()[0]}); expected a folder with a "
                f"CLIP model, its tokenizer and preprocessor_config.json, as transformers saves them. Fetch it again."
            ) from None

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        """The mean score of images, each with its prompt."""
        scores = []
        for first in range(0, len(images), AT_ONCE):
            given = self.processor(
                text=list(prompts[first : first + AT_ONCE]),
                images=list(images[first : first + AT_ONCE]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            found = self.model(**given.to(self.model.device))  # its embeddings have length 1
            scores.append((found.image_embeds * found.text_embeds).sum(-1).clamp(min=0) * 100)
        return float(torch.cat(scores).mean())


def wanted(config: Config) -> bool:
    """Whether sample images are measured."""
    return bool(config.validation.judge) or config.validation.clip != "none"


def require(config: Config) -> None:
    """Check, before anything starts, what can be. Raises UserError."""
    table = config.validation
    if wanted(config) and not config.log.prompts:
        raise UserError("log.prompts is empty; validation.judge and validation.clip measure the images of its prompts.")
    if table.judge and not shutil.which(table.judge[0]):
        raise UserError(
            f"validation.judge: there is no command {table.judge[0]}; expected a program and its arguments, such as "
            f'["python", "judge.py"]. Change it.'
        )
    if table.clip != "none" and not (Path(table.clip) / "config.json").is_file():
        raise UserError(
            f"validation.clip: {table.clip} has no config.json; expected a folder with a CLIP model as transformers "
            f"saves one. Change it."
        )
    chosen = table.best.partition(" ")[2]
    lacks = (chosen == "loss" and not table.images, chosen == CLIP_SCORE and table.clip == "none")
    if (table.images or wanted(config)) and any(lacks):
        raise UserError(
            f"validation.best = {table.best!r} is not measured; expected lowest or highest and a measure: loss with "
            f"validation.images, {CLIP_SCORE} with validation.clip, or a name that validation.judge prints. Change it."
        )


@dataclass(frozen=True)
class Measures:
    """All that is measured of a folder of images."""

    judge: Judge | None
    clip: ClipScore | None

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Measures:
        """Those that the configuration names. Raises UserError where CLIP cannot be loaded."""
        table = config.validation
        return cls(
            Judge(table.judge) if table.judge else None,
            ClipScore(Path(table.clip), device) if table.clip != "none" else None,
        )

    def __call__(self, folder: Path, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
        """The measures by name. Raises UserError where the judge fails."""
        found = {CLIP_SCORE: self.clip(images, prompts)} if self.clip else {}
        return found | (self.judge(folder) if self.judge else {})
