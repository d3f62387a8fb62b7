"""The study's students, distilled out of sdxl-tiny.

How much of a LoRA survives on a student depends on how far distillation moved the layers that the two share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.measure import lineage as lineages
from tools.tiny import dataset

from ....koala.architecture.layout import KOALA_TINY
from ....koala.architecture.lineage import lineage
from ... import train
from ...config import Config
from ..judging import SIZE
from ..runs import TRAINING, WEIGHTING, data

PICTURES = 800
STUDENTS: dict[str, dict[str, Any]] = {
    "distilled": {**TRAINING, "steps": 400, "batch": 16, "learning_rate": 2e-3},
}
"""Name -> how it is trained."""


def config(name: str, teacher: Path, work: Path) -> Config:
    """The configuration of a student's training."""
    return Config.model_validate(
        {
            "output": work / "student" / name,
            "teacher": {"model": teacher, "dtype": "fp32"},
            "student": {"layout": "koala-700m"},
            "data": data(work),
            "loss": {"place": "residual", **WEIGHTING},
            "training": {**STUDENTS[name], "checkpoint_every": 100},
        }
    )


def distilled(name: str, teacher: Path, work: Path) -> Path:
    """A student's file, trained if it is not there."""
    settings = config(name, teacher, work)
    file = settings.output / "result" / f"{settings.output.name}.safetensors"
    if not file.exists():
        dataset.write(work / f"drawings-{SIZE}", SIZE, PICTURES)
        train.run(settings, lambda line: print(line, flush=True))
    return file


def distance(teacher: Path, student: Path) -> float:
    """How far a student is from the teacher, as `dev.py lineage` measures it."""
    return lineages.distance(*lineages.open_pair(teacher, student), lineage(KOALA_TINY))
