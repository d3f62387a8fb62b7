"""Distillations that run: sdxl-tiny with random weights into koala-tiny's layout, on a dozen drawings of 64 pixels."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch.utils.data import default_collate

from koala_sdxl.distill import cache, config, features, student, train
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.objective import Objective
from koala_sdxl.distill.teacher import open_teacher
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.architecture.lineage import lineage
from tools.harness import testhost
from tools.harness.testhost import ROOT
from tools.measure import reference
from tools.tiny import SHIPPED, dataset, denoiser, pipeline, text
from tools.tiny.grow import SDXL_TINY

State = dict[str, torch.Tensor]
LINE = lineage(KOALA_TINY)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_START"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1"}
SETTINGS: dict[str, dict[str, Any]] = {
    "teacher": {"model": "sdxl-tiny", "dtype": "fp32"},
    "data": {
        "path": "pictures",
        "cache": "cache",
        "resolution": 64,
        "bucket_step": 8,
        "max_aspect": 1.0,
        "workers": 0,
    },
    "training": {"steps": 2, "batch": 2, "learning_rate": 1e-3, "warmup": 1, "ema": 0.5, "precision": "no"},
    "log": {"every": 1},
}
"""A run of two steps; a test names only what it changes."""


def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the teacher and the pictures; configurations lie there, and runs write into it."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = testhost.test_host().tokenizer
    shipped = reference.pipeline(SHIPPED)
    torch.manual_seed(0)
    unet = denoiser.new_unet(SDXL_TINY)
    encoders = text.Encoders(shipped.text_encoder, shipped.text_encoder_2)
    teacher = pipeline.assemble(shipped.vae, encoders, text.tokenizers(tokenizer), unet)
    pipeline.save(teacher, folder / "sdxl-tiny")
    dataset.write(folder / "pictures", 64, 12)
    yield folder
    shutil.rmtree(folder)  # some gigabytes of checkpoints


def no_accelerator_left() -> Iterator[None]:
    """accelerate keeps its state in the process, and a run is made for a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def toml(value: object) -> str:
    """A value as a TOML file has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def described(place: Path, name: str, tables: Mapping[str, dict[str, Any]]) -> Path:
    """A configuration's file: ``SETTINGS`` with these changes. Its output is ``place / name``."""
    lines = [f'output = "{name}"']
    for table in dict.fromkeys((*SETTINGS, *tables)):
        lines += [f"[{table}]"]
        lines += [
            f"{key} = {toml(value)}" for key, value in {**SETTINGS.get(table, {}), **tables.get(table, {})}.items()
        ]
    path = place / f"{name}.toml"
    path.write_text("\n".join(lines), "utf-8")
    return path


def run(place: Path, name: str, watch: train.Watch | None = None, /, **tables: dict[str, Any]) -> list[str]:
    """A run in this process; what it says."""
    said: list[str] = []
    train.run(config.read(described(place, name, tables)), said.append, watch)
    return said


def refused(place: Path, name: str, watch: train.Watch | None = None, /, **tables: dict[str, Any]) -> str:
    """What a run says that is refused, or ends early, and leaves no result."""
    with pytest.raises(UserError) as problem:
        run(place, name, watch, **tables)
    assert not (place / name / "result").exists()
    return str(problem.value)


def process(*words: str, **options: Any) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, text=True, **{"env": ENVIRONMENT, **pipes, **options}
    )


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics, without what a clock said."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "images_per_s"} for row in csv.DictReader(file)]


def saved(folder: Path) -> Path:
    """The result as one file."""
    return folder / "result" / f"{folder.name}.safetensors"


def checkpoints(folder: Path) -> list[str]:
    """The names of a run's checkpoints, oldest first."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def same(first: Path, second: Path) -> bool:
    """Whether two files hold the same weights, bit for bit."""
    states = load_file(first), load_file(second)
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def objective(table: config.Config, network: torch.nn.Module) -> Objective:
    """What a run of this configuration minimises for this student."""
    teacher = open_teacher(table.teacher)
    master, pairs = teacher.unet(), features.pairs(LINE, table.loss)
    return Objective(
        table=table.loss,
        dropout=table.data.caption_dropout,
        noise=teacher.noise,
        teacher=master,
        pairs=pairs,
        teacher_features=features.FeatureRecorder(master, (pair.teacher for pair in pairs)),
        student_features=features.FeatureRecorder(network, (pair.student for pair in pairs)),
    )


def pictures(table: config.Config, indices: list[int]) -> State:
    """A batch of cached pictures."""
    samples = cache.ready(table.data, open_teacher(table.teacher).identity)
    assert samples is not None
    return default_collate([samples[index] for index in indices])


def first_weights(table: config.Config) -> UNet2DConditionModel:
    """The student before its first step."""
    return student.build(LINE, "teacher", open_teacher(table.teacher).unet(), table.training.seed)
