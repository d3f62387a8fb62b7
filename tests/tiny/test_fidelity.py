"""The shipped koala-tiny draws what it is asked for, at KOALA's published base settings."""

from __future__ import annotations

from typing import Any

import pytest

from tools.measure import reference
from tools.tiny import SHIPPED, evaluate, pipeline


@pytest.fixture(scope="module")
def model() -> Any:
    return reference.pipeline(SHIPPED)


def test_the_judge_itself_is_right() -> None:
    judged = evaluate.judge_score(600)
    assert min(judged.colour, judged.background, judged.shape) >= 99


@pytest.mark.slow
@pytest.mark.parametrize("count", [54, pytest.param(evaluate.PROMPTS, marks=pytest.mark.nightly)])
def test_prompts_are_followed(count: int, model: Any) -> None:
    """By day with every shape in every colour once; the published figures are of all prompts."""
    prompts, asked = evaluate.grid_prompts(count)
    found = evaluate.score(pipeline.pictures(model, prompts, seed=evaluate.SEED, batch=18), asked)
    assert found.colour >= 95
    assert found.background >= 95
    assert found.shape >= 90


@pytest.mark.slow
def test_the_negative_prompt_red_takes_red_away(model: Any) -> None:
    found, _, _ = evaluate.negative_red(model, each=4)
    assert found.with_red < found.without
    assert found.p < 0.01


def test_the_file_is_small_enough() -> None:
    assert SHIPPED.stat().st_size <= 32_000_000
