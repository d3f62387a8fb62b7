"""Early word on divergence: what is not finite is found with its step, a loss far above its level is told once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from koala_sdxl.distill import config
from koala_sdxl.distill.divergence import NEVER, ROWS, Finite, Level
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.evaluation import Due
from koala_sdxl.distill.metrics import Means
from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, refused, run

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)


def seen(level: Level, losses: list[float]) -> list[tuple[int, float]]:
    """The rows after which it is told, from 1, and the level that is named."""
    found = [(row, level.see(loss)) for row, loss in enumerate(losses, 1)]
    return [(row, told) for row, told in found if told is not None]


def ordinary(rows: int) -> list[float]:
    """A loss that falls from 1 to 0.5 and scatters by a third, as that of small batches does."""
    generator = np.random.default_rng(0)
    return ((0.5 + 0.5 * np.exp(-np.arange(rows) / 50)) * generator.lognormal(0, 0.3, rows)).tolist()


def test_an_ordinary_loss_is_no_divergence() -> None:
    assert seen(Level(), ordinary(2000)) == []


def test_a_jump_is_told_once() -> None:
    level, losses = Level(), ordinary(300)
    ((row, told),) = seen(level, [*losses, 30.0, 30.0, 30.0])
    assert row == 301
    assert told == pytest.approx(0.5, rel=0.3)
    later = Means()
    means = Means()
    means.level = level
    later.load_state_dict(means.state_dict())
    assert vars(later.level) == vars(level)
    assert seen(later.level, [30.0, 60.0]) == []


def test_a_slow_rise_is_told() -> None:
    ((row, told),) = seen(Level(), [*ordinary(300), *(0.5 * 1.03**step for step in range(200))])
    assert 300 < row < 350
    assert told < 0.6


def test_a_run_begins_with_whatever_loss() -> None:
    assert seen(Level(), [1.0, *[50.0] * (ROWS - 1)]) == []


def test_the_first_step_and_value_that_is_not_finite_are_named(tmp_path: Path) -> None:
    finite, accelerator = Finite(), Accelerator(cpu=True)
    one, bad = torch.ones(()), torch.full((), torch.inf)
    for step, task, feature, norm in ((1, one, one, one), (2, one, bad, bad), (3, bad, -bad, bad * 0)):
        finite.see({"task error": task, "feature error": feature}, step)
        finite.see({"gradient's norm": norm}, step)
    assert [int(first) for first in finite.first.values()] == [3, 2, 2]
    (tmp_path / "step-0000001").mkdir()
    with pytest.raises(UserError) as problem:
        finite.require(accelerator, tmp_path)
    assert str(problem.value).startswith(
        f"step 2: the feature error is not finite; training has stopped and the last good state is "
        f"{tmp_path / 'step-0000001'}. Lower training.learning_rate, or "
    )
    fine = Finite()
    fine.see({"loss": one}, 1)
    fine.require(accelerator, tmp_path)
    assert int(fine.first["loss"]) == NEVER


def test_what_is_not_finite_between_two_rows_leaves_no_checkpoint(place: Path) -> None:
    """Rows come every tenth step; a checkpoint is due before, and is not written."""
    training = {**SETTINGS["training"], "learning_rate": 1e30, "steps": 9, "checkpoint_every": 4}
    said = refused(place, "leap", training=training, log={"every": 10})
    assert said.startswith("step 2: the task error is not finite; training has stopped and there is no checkpoint")
    assert not (place / "leap" / "checkpoints").exists()


@pytest.mark.nightly
def test_a_loss_that_leaps_is_told_and_training_goes_on(place: Path) -> None:
    """A learning rate that spoils the student, once the loss has had a level."""
    training = {**SETTINGS["training"], "learning_rate": 1e-6, "steps": ROWS + 5, "final_rate": 1.0}
    assert run(place, "steady", training={**training, "steps": ROWS + 1}, validation={"images": 0})[-1:] == [
        f"finished: {place / 'steady' / 'result'}"
    ]
    (place / "steady" / "result").rename(place / "steady" / "earlier")
    said = run(place, "steady", training={**training, "learning_rate": 0.05})
    (told,) = (line for line in said if "far above its level" in line)
    assert told.startswith("step ")
    assert "Training goes on." in told
    assert said[-1] == f"finished: {place / 'steady' / 'result'}"


def test_everything_is_due_after_the_last_step(place: Path) -> None:
    tables = {
        "training": {**SETTINGS["training"], "steps": 5, "checkpoint_every": 4},
        "validation": {"images": 2, "every": 3},
        "log": {"every": 2},
    }
    table = config.read(distill_runs.described(place, "due", tables))
    assert [Due.at(table, step) for step in range(1, 6)] == [
        Due(row=False, validation=False, checkpoint=False, samples=False),
        Due(row=True, validation=False, checkpoint=False, samples=False),
        Due(row=False, validation=True, checkpoint=False, samples=False),
        Due(row=True, validation=False, checkpoint=True, samples=False),
        Due(row=True, validation=True, checkpoint=True, samples=False),
    ]
