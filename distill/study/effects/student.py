"""The study's second student: distilled out of sdxl-tiny in large steps; a little farther from it than koala-tiny is.

How much of a LoRA survives on a student depends on how far distillation moved the layers that the two share.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from safetensors.torch import load_file

from tools.tiny import dataset, pipeline

from ....koala.architecture.layout import KOALA_TINY
from ....koala.architecture.lineage import lineage
from ....koala.files.conventions import UNET_PREFIX
from ... import train
from ...config import Config
from ..judging import SIZE
from ..runs import TRAINING, WEIGHTING, data

PICTURES = 800
STEPS: dict[str, Any] = {**TRAINING, "steps": 400, "batch": 16, "learning_rate": 2e-3}


def config(teacher: Path, work: Path) -> Config:
    """The configuration of its training."""
    return Config.model_validate(
        {
            "output": work / "student" / "distilled",
            "teacher": {"model": teacher, "dtype": "fp32"},
            "student": {"layout": "koala-700m"},
            "data": data(work),
            "loss": {"place": "residual", **WEIGHTING},
            "training": {**STEPS, "checkpoint_every": 100},
        }
    )


def distilled(teacher: Path, work: Path) -> Path:
    """Its file, trained if it is not there."""
    settings = config(teacher, work)
    file = settings.output / "result" / f"{settings.output.name}.safetensors"
    if not file.exists():
        dataset.write(work / f"drawings-{SIZE}", SIZE, PICTURES)
        train.run(settings, lambda line: print(line, flush=True))
    return file


def distance(teacher: Path, student: Path) -> float:
    """How far a student's matrices and convolutions are from the teacher's that they came from: the norm of the
    difference, as a share of the teacher's; mean."""
    whole, part = pipeline.load(teacher).unet.state_dict(), load_file(student)
    pairs = ((part[UNET_PREFIX + own.comfy].float(), whole[its.diffusers]) for own, its in lineage(KOALA_TINY).tensors)
    return mean(float((own - its).norm() / its.norm()) for own, its in pairs if own.ndim > 1)
