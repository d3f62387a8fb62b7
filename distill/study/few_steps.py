"""Step distillation, measured: koala-tiny teaches itself to draw in eight steps without guidance.

Usage: python -m tools.run koala_sdxl.distill.study.few_steps --work DIR

One run on one thread, resumed by the same command; its figures go to runs/few_steps.json, its images to few_steps.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from tools.harness import testhost
from tools.measure import markdown
from tools.measure.bench import meter
from tools.tiny import SHIPPED, dataset, evaluate, pipeline

from ...koala.releases import BASE, LIGHTNING, Spacing
from .. import single_file, train
from ..config import Config
from . import plots
from .judging import PROMPTS, SIZE
from .runs import PICTURES, TRAINING, data

STEPS = 400
LOOKS = 100  # training steps between two judgements of the images
SHOWN = range(0, PROMPTS, 17)  # prompts in the picture: other shapes and colours each time


@dataclass(frozen=True)
class Row:
    """A way to draw."""

    model: str
    """teacher or student"""
    steps: int
    cfg: float
    spacing: Spacing

    def __str__(self) -> str:
        return f"{self.model}, {self.steps} steps, cfg {self.cfg:g}, {self.spacing}"


TEACHER = Row("teacher", BASE.settings.steps, BASE.settings.cfg, BASE.settings.spacing)
UNTRAINED = Row("teacher", 8, 1.0, "trailing")
STUDENT = Row("student", 8, 1.0, "trailing")
ROWS = (
    TEACHER,
    Row("teacher", 24, BASE.settings.cfg, "trailing"),
    Row("teacher", 8, BASE.settings.cfg, "trailing"),
    UNTRAINED,
    STUDENT,
    Row("student", LIGHTNING.settings.steps, 1.0, "trailing"),
    Row("student", LIGHTNING.settings.steps, LIGHTNING.settings.cfg, "trailing"),
)
"""What is judged: the teacher as published, with the steps of its lessons, and with the student's; the student."""
PICTURED = (TEACHER, UNTRAINED, STUDENT)


def config(work: Path) -> Config:
    """The configuration of the run."""
    return Config.model_validate(
        {
            "output": work / "runs" / "few-steps",
            "teacher": {"model": SHIPPED, "tokenizer": testhost.test_host().tokenizer, "dtype": "fp32"},
            "data": {**data(work), "cache": work / f"cache-{SIZE}-koala-tiny", "caption_dropout": 0.0},
            "steps": {"student": STUDENT.steps},
            "training": {
                **TRAINING,
                "steps": STEPS,
                "checkpoint_every": 20,
            },
            "log": {"samples_every": LOOKS},
        }
    )


def carry_out(work: Path) -> None:
    """Train, judge at intervals and at the end, and write figures and images."""
    dataset.write(work / f"drawings-{SIZE}", SIZE, PICTURES)
    settings = config(work)
    tokenizer = testhost.test_host().tokenizer
    model = single_file.pipeline(SHIPPED, tokenizer)
    unets = {"teacher": model.unet}
    path, curve = settings.output.with_suffix(".curve.json"), {}
    if path.exists():  # judged by a process that was interrupted
        curve = json.loads(path.read_text())

    def look(step: int, unet: UNet2DConditionModel) -> None:
        curve[str(step)] = asdict(judged(drawn(model, STUDENT, unet)))
        path.write_text(json.dumps(curve))

    train.run(settings, lambda line: print(line, flush=True), look)
    result = settings.output / "result" / f"{settings.output.name}.safetensors"
    unets["student"] = single_file.pipeline(result, tokenizer).unet
    images = {row: drawn(model, row, unets[row.model]) for row in ROWS}
    found = {
        "rows": [{**asdict(row), "score": asdict(judged(made))} for row, made in images.items()],
        "curve": curve,
        "config": settings.model_dump(mode="json", include={"steps", "training"}),
        "computer": meter.computer(),
    }
    prompts, _ = evaluate.grid_prompts(PROMPTS)
    plots.labelled(
        {str(row): images[row][list(SHOWN)] for row in PICTURED},
        [prompts[at] for at in SHOWN],
        work / "runs" / "few_steps.png",
    )
    (work / "runs" / "few_steps.json").write_text(json.dumps(found, indent=1))


def drawn(model: StableDiffusionXLPipeline, row: Row, unet: UNet2DConditionModel, count: int = PROMPTS) -> torch.Tensor:
    """An image of each of the first ``count`` prompts, float32 [count, 3, s, s] in [-1, 1]; number i from the seed
    1000 + i."""
    model.unet = unet
    model.scheduler = model.scheduler.from_config(model.scheduler.config, timestep_spacing=row.spacing)
    prompts, _ = evaluate.grid_prompts(PROMPTS)
    prompts = prompts[:count]
    return pipeline.pictures(model, prompts, seed=evaluate.SEED, size=SIZE, steps=row.steps, cfg=row.cfg)


def judged(images: torch.Tensor) -> evaluate.Score:
    """The score of ``drawn`` images."""
    return evaluate.score(images, evaluate.grid_prompts(PROMPTS)[1].pick(torch.arange(len(images))))


def few_steps(data: Mapping[str, Any]) -> str:
    """The page's section."""
    measured = data["few_steps"]
    training, steps, computer = measured["config"]["training"], measured["config"]["steps"], measured["computer"]
    columns = {"all": "all correct, %", "shape": "shape, %", "colour": "colour, %", "background": "background, %"}
    rows = "\n".join(
        markdown.table(
            ["model", "steps", "cfg", "spacing", *columns.values()],
            (
                [
                    *(row["model"], row["steps"], f"{row['cfg']:g}", row["spacing"]),
                    *(f"{row['score'][name]:.1f}" for name in columns),
                ]
                for row in measured["rows"]
            ),
        )
    )
    curve = sorted((int(step), score["all"]) for step, score in measured["curve"].items())
    along = "\n".join(
        markdown.table(
            ["training steps", *(step for step, _ in curve)],
            [["all correct, %", *(f"{all_:.1f}" for _, all_ in curve)]],
        )
    )
    return f"""## Fewer steps, without guidance

*Step distillation* ([how to use it](../distill/README.md#fewer-steps)): koala-tiny teaches a student of its own layout,
which begins with its weights, to draw in {steps["student"]} steps at cfg 1. Each step of the student is to end where
{steps["teacher"]} of the teacher's at cfg {steps["guidance"]:g} end. {training["steps"]} training steps of
{training["batch"]} captions, AdamW at {training["learning_rate"]:g}, average of {training["ema"]:g}; one run, seed
{training["seed"]}, on one core of {computer["cpu"]}. {measured["rows"][0]["score"]["n"]} prompts, one image each, seeds
{evaluate.SEED} to {evaluate.SEED + measured["rows"][0]["score"]["n"] - 1}, the same for every row, drawn by diffusers
with Euler in fp32; one image is {100 / measured["rows"][0]["score"]["n"]:.1f} points.

{rows}

![The same prompts: {"; ".join(map(str, PICTURED))}](distillation-steps.png)

The averaged student at {steps["student"]} steps and cfg 1 during training, {PROMPTS} prompts:

{along}
"""


def main(argv: list[str] | None = None) -> int:
    """The run, in this process."""
    parser = argparse.ArgumentParser(prog="few-steps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    torch.set_num_threads(1)
    carry_out(parser.parse_args(argv).work.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
