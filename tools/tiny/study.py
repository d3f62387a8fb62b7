"""Distillation tried out on the small family: sdxl-tiny teaches students of koala-tiny's layout, by `dev.py distill`'s
own engine. Curves against training from nothing, the paper's ablation, the choice of layers; the figures behind
docs/distillation.md.

Usage: python -m tools.tiny.study --teacher DIR [--work DIR] [--jobs 2] [--only NAME ...]

Every run is a process of its own with one thread, and leaves a JSON file; what is there already is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tools.distill import train
from tools.distill.config import PLACES, Config
from tools.problem import Problem
from tools.testhost import ROOT
from tools.tiny import dataset, evaluate, pipeline

SIZE = 64  # pixels: a quarter of the work of koala-tiny's 128, and the teacher knows both
PICTURES = 4000
PROMPTS = 108
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One training: what differs between the runs. ``looks``: steps between two judgements of its pictures."""

    name: str
    group: str
    steps: int
    looks: int
    seed: int = 0
    start: str = "teacher"
    transformers: str = "first"
    place: str = "self-attention"
    output: float = 1.0


CURVES = (
    Run("distilled", "curve", 800, 100),
    Run("cut, task only", "curve", 800, 100, place="none", output=0.0),
    Run("from nothing", "curve", 800, 100, start="random", place="none", output=0.0),
)
ABLATION = tuple(
    Run(f"{place}, seed {seed}", "place", 200, 200, seed, place=place) for place in PLACES for seed in SEEDS
)
LAYERS = tuple(Run(f"even, seed {seed}", "layers", 200, 200, seed, transformers="even") for seed in SEEDS)
RUNS = (*CURVES, *ABLATION, *LAYERS)


def config(run: Run, teacher: Path, work: Path) -> Config:
    """The configuration of a run, as a TOML file would hold it."""
    return Config.model_validate(
        {
            "output": work / "runs" / run.name.replace(", ", "-").replace(" ", "-"),
            "teacher": {"model": teacher, "dtype": "fp32"},
            "student": {"layout": "koala-700m", "start": run.start, "transformers": run.transformers},
            "data": {
                "path": work / f"drawings-{SIZE}",
                "cache": work / f"cache-{SIZE}",
                "resolution": SIZE,
                "bucket_step": 8,
                "max_aspect": 1.0,
                "workers": 0,
            },
            "loss": {"place": run.place, "output": run.output, "weighting": "velocity"},
            "training": {
                "steps": run.steps,
                "batch": 32,
                "learning_rate": 1e-3,
                "warmup": 30,
                "betas": (0.9, 0.99),
                "ema": 0.99,
                "precision": "no",
                "seed": run.seed,
                "checkpoint_every": 200,
                "keep": 1,
            },
            "log": {"samples_every": run.looks},
        }
    )


def carry_out(run: Run, teacher: Path, work: Path) -> None:
    """Train, judge on the way, and write the run's JSON file."""
    settings = config(run, teacher, work)
    prompts, asked = evaluate.grid_prompts(PROMPTS)
    model = pipeline.load(teacher)
    path, curve = settings.output.with_suffix(".curve.json"), {}
    if path.exists():  # what an earlier process saw before it was stopped
        curve = json.loads(path.read_text())

    def look(step: int, unet: UNet2DConditionModel) -> None:
        model.unet = unet
        made = pipeline.pictures(model, prompts, seed=evaluate.SEED, size=SIZE)
        curve[str(step)] = asdict(evaluate.score(made, asked))
        path.write_text(json.dumps(curve))

    train.run(settings, lambda line: print(line, flush=True), look)
    rows = (settings.output / "metrics.csv").read_text().splitlines()
    head, tail = rows[0].split(","), [row.split(",") for row in rows[-5:]]
    errors = {name: sum(float(row[at]) for row in tail) / len(tail) for at, name in enumerate(head) if name != "step"}
    found = {**asdict(run), "curve": curve, "last_errors": errors}
    settings.output.with_suffix(".json").write_text(json.dumps(found, indent=1))


def teacher_score(teacher: Path, work: Path) -> None:
    """The same judgement of the teacher itself."""
    path = work / "runs" / "teacher.json"
    if not path.exists():
        prompts, asked = evaluate.grid_prompts(PROMPTS)
        made = pipeline.pictures(pipeline.load(teacher), prompts, seed=evaluate.SEED, size=SIZE)
        path.write_text(json.dumps(asdict(evaluate.score(made, asked)), indent=1))


def results(work: Path) -> dict[str, Any]:
    """What every finished run left, by its name."""
    files = [config(run, work, work).output.with_suffix(".json") for run in RUNS]
    return {run.name: json.loads(file.read_text()) for run, file in zip(RUNS, files, strict=True) if file.exists()}


def all_runs(teacher: Path, work: Path, jobs: int, only: list[str]) -> None:
    """Every run that has not been finished, ``jobs`` at a time. Raises Problem where one fails."""
    dataset.write(work / f"drawings-{SIZE}", SIZE, PICTURES)
    (work / "runs").mkdir(parents=True, exist_ok=True)
    waiting = [run for run in RUNS if run.name not in results(work) and (not only or run.group in only)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    def one(run: Run) -> None:
        log = config(run, teacher, work).output.with_suffix(".log")
        command = [sys.executable, "-m", "tools.tiny.study", "--teacher", str(teacher), "--work", str(work)]
        with log.open("w") as file:
            done = subprocess.run([*command, "--one", run.name], cwd=ROOT, env=environment, stdout=file, stderr=file)
        if done.returncode:
            raise Problem(f"the run {run.name} failed; {log} says why. Mend it and run again.")
        print(f"done: {run.name}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        if waiting:
            one(waiting[0])  # alone: it fills the cache that the others share
        list(pool.map(one, waiting[1:]))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="study", description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="sdxl-tiny's folder, from train-tiny --teacher")
    parser.add_argument("--work", type=Path, default=Path("distillation-study"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--only", nargs="*", default=[], help="groups of runs: curve, place, layers")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    teacher, work = arguments.teacher.resolve(), arguments.work.resolve()
    try:
        if arguments.one:
            torch.set_num_threads(1)
            carry_out(next(run for run in RUNS if run.name == arguments.one), teacher, work)
        else:
            all_runs(teacher, work, arguments.jobs, arguments.only)
            teacher_score(teacher, work)
    except Problem as problem:
        print(f"study: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
