"""KOALA Accelerate checks what it extrapolates, whatever the prompts of a pass are, and in however many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import nodes as core
from tests.speed import sampling
from tests.speed.sampling import Said, decibels, plain, prompts, run
from tools.measure import parity

said = pytest.fixture(sampling.said)
faster = pytest.fixture(sampling.faster)


def test_areas_and_several_prompts(faster: Callable[..., Any], said: Said) -> None:
    positive, negative = prompts()
    other = prompts(["a blue square on a black background"])[0]
    left = core.ConditioningSetArea().append(positive, 64, 128, 0, 0, 1.0)[0]
    right = core.ConditioningSetArea().append(other, 64, 128, 64, 0, 1.0)[0]
    texts = (left + right, negative)
    assert decibels(run(faster(), texts), plain(texts)) >= 50
    assert said.full <= 16


def test_each_side_in_a_call_of_its_own(
    faster: Callable[..., Any], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ComfyUI samples where memory is short."""
    wanted = run(faster())
    monkeypatch.setattr(parity.tiny_models()[0].model, "memory_required", lambda *_, **__: 1e30)
    rows = []
    unet = parity.tiny_models()[0].model.diffusion_model
    hook = unet.out.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    found = run(faster())
    hook.remove()
    assert set(rows) == {1}
    assert decibels(found, wanted) >= 60
    assert said[-1] == said[0]
