"""The shipped koala-tiny draws what it is asked for, at KOALA's published base settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tools.measure import reference
from tools.tiny import SHIPPED, evaluate, pipeline


@pytest.fixture(scope="module")
def model() -> Any:
    return reference.pipeline(SHIPPED)


def test_the_judge_itself_is_right() -> None:
    judged = evaluate.judge_score(600)
    assert min(judged.colour, judged.background, judged.shape) >= 99


@pytest.mark.slow
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.nightly)])
def test_prompts_are_followed(every: int, model: Any) -> None:
    """By day some prompts with every shape and every colour; the published figures are of all."""
    prompts, asked = evaluate.grid_prompts(evaluate.PROMPTS)
    chosen = torch.arange(0, len(prompts), every)
    made = pipeline.pictures(model, [prompts[at] for at in chosen], seed=evaluate.SEED, batch=18)
    found = evaluate.score(made, asked.pick(chosen))
    assert found.colour >= 95
    assert found.background >= 95
    assert found.shape >= 90


@pytest.mark.slow
@pytest.mark.nightly
def test_the_negative_prompt_red_takes_red_away(model: Any) -> None:
    found, _, _ = evaluate.negative_red(model, each=4)
    assert found.with_red < found.without
    assert found.p < 0.01


def test_the_file_is_small_enough() -> None:
    assert SHIPPED.stat().st_size <= 32_000_000
