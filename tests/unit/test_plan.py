"""Which steps run the full U-Net in KOALA Accelerate, and when a run's features may be used. No ComfyUI needed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from koala_sdxl.host.accelerate.feature_cache import Run
from koala_sdxl.host.accelerate.plan import MAX_EXTRAPOLATION, PRESETS, REUSE, WARMUP_LEVELS, WARMUP_STEPS, full_steps
from koala_sdxl.koala.schedule import schedule


def numbers(count: int) -> list[float]:
    """Noise levels at which the steps of a leading schedule begin."""
    return schedule(count, "leading").sigmas[:-1].tolist()


BASE = numbers(25)


TABLES = {
    f"{name}, {kind}": getattr(reuse, kind)
    for name, reuse in REUSE.items()
    if name != "off"
    for kind in ("single_step", "multistep")
}
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def test_without_a_table_every_step_is_full() -> None:
    assert full_steps(BASE, ()) == frozenset(range(25))
    assert full_steps([], TABLES["fast, single_step"]) == frozenset()


def test_the_tables_at_the_published_steps() -> None:
    full = {name: len(full_steps(BASE, table)) for name, table in TABLES.items()}
    assert full == {
        "balanced, single_step": 12,
        "balanced, multistep": 15,
        "fast, single_step": 9,
        "fast, multistep": 13,
    }
    assert all(len(table) == full[name] for name, table in TABLES.items())


@each_table
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 15, 20, 30, 50, 100, 1000])
def test_any_number_of_steps(table: tuple[float, ...], count: int) -> None:
    full = full_steps(numbers(count), table)
    assert set(range(min(count, WARMUP_STEPS))) <= full
    assert len(full) <= max(len(table) + 5, 36)  # at a thousand steps they stand closer than the table for long
    if count >= 30:
        assert len(full) >= len(table)


@each_table
def test_tables_fall(table: tuple[float, ...]) -> None:
    assert list(table) == sorted(set(table), reverse=True)
    assert all(0 < level < 15 for level in table)


@each_table
@pytest.mark.parametrize("begin", [0, 6, 12, 20])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_no_feature_is_extrapolated_too_far(table: tuple[float, ...], begin: int, every: int) -> None:
    sigmas = numbers(100)[begin::every]
    logs, full = [math.log(sigma) for sigma in sigmas], sorted(full_steps(sigmas, table))
    for first, second in pairwise(full):
        last = next((step for step in full if step > second), len(sigmas)) - 1
        assert logs[second] - logs[last] <= (MAX_EXTRAPOLATION + 0.1) * (logs[first] - logs[second])


def test_image_to_image_has_a_beginning_and_the_table_s_later_part() -> None:
    table = TABLES["balanced, single_step"]
    whole, late = full_steps(BASE, table), BASE[12:]
    begins = {next(step for step, sigma in enumerate(late) if sigma <= part * late[0]) for part in WARMUP_LEVELS}
    found = full_steps(late, table)
    assert found >= {step - 12 for step in whole if step >= 12} | {0, 1, 2, 3} | begins
    assert len(found) <= 11


def test_a_whole_run_has_the_beginning_of_its_table() -> None:
    assert [round(sigma / BASE[0], 2) for sigma in BASE[1:WARMUP_STEPS]] == list(WARMUP_LEVELS)
    for table in TABLES.values():
        assert full_steps([15.0, *BASE], table) == {0, *(step + 1 for step in full_steps(BASE, table))}


def test_levels_between_the_table_s_and_rounding() -> None:
    assert full_steps([9.0, 8.5, 8.2, 8.0, 7.02, 6.9, 6.8], (7.0,)) == {0, 1, 2, 3, 4}
    assert full_steps([9.0, 8.5, 8.2, 8.0, 7.9, 6.9, 6.8], (7.0,)) == {0, 1, 2, 3, 5}
    assert full_steps([9.0, 8.5, 8.2, 8.0, 7.9], (7.0, 0.5)) == {0, 1, 2, 3}


def test_presets_differ_in_what_they_leave_out() -> None:
    assert [bool(preset.reuse.single_step) for preset in PRESETS.values()] == [False, True, True]
    for balanced, fast in zip(PRESETS["balanced"].reuse, PRESETS["fast"].reuse, strict=True):
        assert len(balanced) > len(fast)


HALVES = [16.0, 8.0, 4.0, 2.0, 1.0, 0.5]


def feature(value: float, parts: int = 1) -> torch.Tensor:
    return torch.full((parts, 2, 1, 1), float(value))


def run(full: set[int]) -> Run:
    return Run(HALVES, frozenset(full))


def evaluate(run: Run, sigma: float, value: float, keys: tuple[str, ...] = ("prompt",)) -> torch.Tensor | None:
    """One evaluation of a model whose deep feature is ``value``; what was extrapolated, None where it was computed."""
    run.begin(sigma)
    extrapolated = run.extrapolated(keys)
    if extrapolated is None:
        run.store(keys, feature(value, len(keys)))
    return extrapolated


def test_a_trend_goes_on_ever_less() -> None:
    course = run({0, 1})
    assert evaluate(course, 16, 10) is None
    assert evaluate(course, 8, 8) is None
    for sigma, away in ((4, 1), (1, 3)):
        extrapolated = evaluate(course, sigma, math.nan)
        assert extrapolated is not None
        assert torch.allclose(extrapolated, feature(8 - 2 * (1 - math.exp(-away))))
    assert str(course).startswith("2 of 4 passes ran the full U-Net")


def test_full_steps_are_computed_once() -> None:
    """A sampler that looks at a step's end first (heun) comes to each time twice."""
    course = run({0, 1, 2})
    for sigma in (16, 8):
        assert evaluate(course, sigma, 1) is None
        if sigma != 16:
            assert evaluate(course, sigma, 1) is not None
    assert evaluate(course, 4, 1) is None
    assert evaluate(course, 4, 1) is not None


def test_a_prompt_that_comes_later_is_computed_first() -> None:
    course = run({0, 1})
    evaluate(course, 16, 1)
    evaluate(course, 8, 1)
    assert evaluate(course, 4, 5, ("other",)) is None
    assert evaluate(course, 2, 5, ("other",)) is None
    assert evaluate(course, 1, 5, ("other",)) is not None
    assert evaluate(course, 0.5, 1, ("prompt",)) is None, "its features are older than the newest"


def test_parts_of_a_call_are_kept_apart() -> None:
    course = run({0, 1})
    course.begin(16)
    assert course.extrapolated(("a", "b")) is None
    course.store(("a", "b"), torch.cat([feature(1), feature(10)]))
    course.begin(8)
    assert course.extrapolated(("a", "b")) is None
    course.store(("a", "b"), torch.cat([feature(2), feature(20)]))
    course.begin(4)
    swapped = course.extrapolated(("b", "a"))
    assert swapped is not None
    expected = torch.tensor([20.0, 2.0]) + (1 - math.exp(-1)) * torch.tensor([10.0, 1.0])
    assert torch.allclose(swapped[:, 0, 0, 0], expected)


def test_the_same_prompt_twice_in_a_step_ends_it() -> None:
    course = run({0, 1})
    evaluate(course, 16, 1)
    evaluate(course, 8, 1)
    course.begin(4)
    assert course.extrapolated(("prompt",)) is not None
    assert course.extrapolated(("prompt",)) is None
    assert "tiled" in course.no_reuse
    assert evaluate(course, 2, 1) is None
    assert str(course).startswith("3 of 4 passes ran the full U-Net")
