"""The runs of the study: sdxl-tiny teaches students with koala-tiny's layout, trained by `dev.py distill`'s own code.

Curves compared with training from scratch, the paper's ablation, the choice of transformer blocks. Every run is a
process of its own with one thread and writes a JSON file; a run whose file exists is not repeated. page.py writes the
page.
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

from tools.harness import testhost
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT
from tools.measure.bench import meter
from tools.tiny import dataset, denoiser, pipeline

from .. import train
from ..config import PLACES, Config
from .judging import SIZE, judge

PICTURES = 2500
BATCH = 32
TRAINING: dict[str, Any] = {
    "batch": BATCH,
    "learning_rate": 1e-3,
    "warmup": 30,
    "betas": (0.9, 0.99),
    "ema": 0.99,
    "precision": "no",
    "keep": 1,
}
"""What the small students of all runs are trained with."""
WEIGHTING = {"weighting": "velocity", "most_weight": denoiser.TEACHER.most_weight}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One training: what differs between the runs. ``looks``: steps between two judgements of its images."""

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
    Run("distilled", "curve", 2000, 400),
    Run("distilled, residual", "curve", 2000, 400, place="residual"),
    Run("from nothing", "curve", 2000, 400, start="random", place="none", output=0.0),
)
STUDENT = CURVES[1]
"""The run whose student the add-ons are applied to, and which koala-tiny is packed from."""
ABLATION = tuple(
    Run(f"{place}, seed {seed}", "place", 200, 200, seed, place=place) for place in PLACES for seed in SEEDS
)
LAYERS = tuple(Run(f"even, seed {seed}", "layers", 200, 200, seed, transformers="even") for seed in SEEDS)
RUNS = (*CURVES, *ABLATION, *LAYERS)


def teacher_folder(work: Path) -> Path:
    """sdxl-tiny, where `train-tiny --teacher --work` writes it."""
    return work / "teacher" / "sdxl-tiny"


def data(work: Path) -> dict[str, Any]:
    """How the drawings in a work folder are read and cached, in every configuration of the study."""
    return {
        "path": work / f"drawings-{SIZE}",
        "cache": work / f"cache-{SIZE}",
        "resolution": SIZE,
        "bucket_step": 8,
        "max_aspect": 1.0,
        "workers": 0,
    }


def config(run: Run, work: Path) -> Config:
    """The configuration of a run."""
    return Config.model_validate(
        {
            "output": work / "runs" / run.name.replace(", ", "-").replace(" ", "-"),
            "teacher": {"model": teacher_folder(work), "dtype": "fp32"},
            "student": {"layout": "koala-700m", "start": run.start, "transformers": run.transformers},
            "data": data(work),
            "loss": {"place": run.place, "output": run.output, **WEIGHTING},
            "training": {
                **TRAINING,
                "steps": run.steps,
                "seed": run.seed,
                "checkpoint_every": 200,
            },
            "log": {"samples_every": run.looks},
        }
    )


def carry_out(run: Run, work: Path) -> None:
    """Train, judge at intervals, and write the run's JSON file."""
    settings = config(run, work)
    path, curve = settings.output.with_suffix(".curve.json"), {}
    if path.exists():  # judged by a process that was interrupted
        curve = json.loads(path.read_text())

    def look(step: int, unet: UNet2DConditionModel) -> None:
        curve[str(step)] = judge(unet, teacher_folder(work), settings.output.with_suffix(".png"))
        path.write_text(json.dumps(curve))

    train.run(settings, lambda line: print(line, flush=True), look)
    rows = (settings.output / "metrics.csv").read_text().splitlines()
    head, tail = rows[0].split(","), [row.split(",") for row in rows[-5:]]
    errors = {name: sum(float(row[at]) for row in tail) / len(tail) for at, name in enumerate(head) if name != "step"}
    found = {**asdict(run), "curve": curve, "last_errors": errors, "computer": meter.computer()}
    settings.output.with_suffix(".json").write_text(json.dumps(found, indent=1))


def judge_teacher(work: Path) -> None:
    """The same judgement of the teacher itself."""
    path = work / "runs" / "teacher.json"
    if not path.exists():
        found = judge(pipeline.load(teacher_folder(work)).unet, teacher_folder(work), path.with_suffix(".png"))
        path.write_text(json.dumps(found, indent=1))


def results(work: Path) -> dict[str, Any]:
    """The figures of every finished run, by name."""
    files = [config(run, work).output.with_suffix(".json") for run in RUNS]
    return {run.name: json.loads(file.read_text()) for run, file in zip(RUNS, files, strict=True) if file.exists()}


def run_all(work: Path, jobs: int, only: list[str]) -> None:
    """Carry out every unfinished run, ``jobs`` at a time; ``only`` names groups. Raises UserError where one fails."""
    dataset.write(work / f"drawings-{SIZE}", SIZE, PICTURES)
    (work / "runs").mkdir(parents=True, exist_ok=True)
    few_steps = work / "runs" / "few_steps.json"
    if not few_steps.exists() and (not only or "steps" in only):
        _process(["koala_sdxl.distill.study.few_steps", "--work", str(work)], few_steps.with_suffix(".log"))
    if only and set(only) == {"steps"}:
        return  # its teacher is the built-in model
    if not teacher_folder(work).exists():
        tokenizer = testhost.test_host().tokenizer
        print("training sdxl-tiny: minutes on a GPU, most of a day on two cores", flush=True)
        command = ["tools.tiny.train", "--teacher", "--tokenizer", str(tokenizer), "--work", str(work / "teacher")]
        _process(command, work / "runs" / "teacher.log", threads=jobs)
    judge_teacher(work)
    done = results(work)
    waiting = [run for run in RUNS if run.name not in done and (not only or run.group in only)]

    def one(run: Run) -> None:
        _process(
            ["koala_sdxl.distill.study.runs", "--work", str(work), run.name],
            config(run, work).output.with_suffix(".log"),
        )
        print(f"done: {run.name}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        if waiting:
            one(waiting[0])  # alone: it computes the cache that the others share
        list(pool.map(one, waiting[1:]))
    found = work / "runs" / "addons.json"
    if not found.exists() and (not only or "addons" in only):
        student = config(STUDENT, work).output
        paths = ["--teacher", teacher_folder(work), "--student", student / "result" / f"{student.name}.safetensors"]
        command = [
            "koala_sdxl.distill.study.addons",
            *map(str, paths),
            "--work",
            str(work / "addons"),
            "--out",
            str(found),
        ]
        _process([*command, "--size", str(SIZE)], found.with_suffix(".log"))


def _process(module: list[str], log: Path, threads: int = 1) -> None:
    """Run a module, its output in a file. Raises UserError where it fails."""
    environment = {**testhost.OPENMP, **os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "tools.run", *module],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            check=False,
        )
    if done.returncode:
        raise UserError(f"{log.stem} failed; {log} says why. Fix the cause and run again.")


def main(argv: list[str] | None = None) -> int:
    """One run, in this process."""
    parser = argparse.ArgumentParser(prog="study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("name", choices=[run.name for run in RUNS])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    carry_out(next(run for run in RUNS if run.name == arguments.name), arguments.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
