"""The loss on held-out images: measured on the averaged student, and the best checkpoint kept."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koala_sdxl.distill import cache, checkpoints, config, losses, validation
from koala_sdxl.distill.teacher import open_teacher
from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, described, first_weights, objective, pictures, run

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)

TABLES = {
    "training": {**SETTINGS["training"], "steps": 3, "learning_rate": 0.02, "keep": 1},
    "validation": {"images": 5, "every": 1},
}
"""Its learning rate spoils the student step by step."""


@pytest.fixture(scope="module")
def spoiled(place: Path) -> tuple[Path, list[str]]:
    """The output folder of a run, and what it said."""
    said = run(place, "spoiled", **TABLES)
    return place / "spoiled", said


def table(folder: Path) -> list[dict[str, float]]:
    with (folder / "validation.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_the_best_checkpoint_is_kept_beside_the_last(spoiled: tuple[Path, list[str]]) -> None:
    folder, said = spoiled
    rows = table(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["loss"] < min(row["loss"] for row in rows[1:])
    saves = folder / "checkpoints"
    assert sorted(path.name for path in saves.iterdir()) == ["best.json", "step-0000001", "step-0000003"]
    assert checkpoints.best(saves) == checkpoints.Best(step=1, measure="lowest loss", value=rows[0]["loss"])
    assert f"the lowest loss in validation is {rows[0]['loss']:.4f}, of step 1; the result is of step 3." in said


def test_the_loss_is_that_of_the_averaged_student_on_held_out_images(
    place: Path, spoiled: tuple[Path, list[str]]
) -> None:
    settings = config.read(described(place, "spoiled", TABLES))
    samples = cache.existing(settings.data, open_teacher(settings.teacher).identity)
    assert samples is not None
    learned, held_out = validation.split(settings, samples)
    assert sorted(learned + held_out) == list(range(12))
    assert len(held_out) == 5
    network = first_weights(settings)
    network.load_state_dict(load_file(spoiled[0] / "checkpoints" / "step-0000003" / "average.safetensors"))
    made = replace(objective(settings, network), dropout=0.0)
    total = 0.0
    for number in range(3):  # batches of 2, 2 and 1
        indices = held_out[2 * number : 2 * number + 2]
        generator = torch.Generator().manual_seed(number * 4096 + 625)
        with torch.no_grad():
            errors = made.errors(network, pictures(settings, indices), generator, torch.full((len(indices),), 625))
        total += len(indices) * float(losses.total(settings.loss, errors))
    assert table(spoiled[0])[2]["loss at 625"] == pytest.approx(total / 5, rel=1e-4)


def test_the_best_student_is_trained_further(place: Path, spoiled: tuple[Path, list[str]]) -> None:
    best = spoiled[0] / "checkpoints" / "step-0000001" / "average.safetensors"
    one = {**SETTINGS["training"], "steps": 1, "learning_rate": 1e-9}
    run(place, "further", student={"start": str(best)}, training=one)
    weights = load_file(place / "further" / "checkpoints" / "step-0000001" / "average.safetensors")
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in load_file(best).items())
