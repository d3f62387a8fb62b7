"""Which steps run the full U-Net in KOALA Accelerate, and when a run's features may be used. No ComfyUI needed."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import pairwise

import pytest
import torch

from koala_sdxl.host.accelerate.feature_cache import Run
from koala_sdxl.host.accelerate.plan import (
    MAX_EXTRAPOLATION,
    PRESETS,
    REUSE,
    WARMUP_LEVELS,
    WARMUP_STEPS,
    Gates,
    falls,
    full_steps,
)
from koala_sdxl.koala.schedule import schedule


@cache
def numbers(count: int) -> list[float]:
    """Noise levels at which the steps of a leading schedule begin."""
    return schedule(count, "leading").sigmas[:-1].tolist()


BASE = numbers(25)


TABLES = {
    f"{name}, {kind}": getattr(reuse, kind).levels
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
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 15, 20, 30, 50, 100, 999])
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
    assert [bool(preset.reuse.single_step.levels) for preset in PRESETS.values()] == [False, True, True]
    for balanced, fast in zip(PRESETS["balanced"].reuse, PRESETS["fast"].reuse, strict=True):
        assert len(balanced.levels) > len(fast.levels)
        assert balanced.max_error <= fast.max_error < 1


NOT_FALLING = (
    [0.0, 0.03, 1.0, 5.0, 14.6],  # unsampling
    [14.6, 10.0, 10.0, 5.0, 2.0, 1.0, 0.0],
    [14.6, 10.0, 5.0, 2.0, 0.0, 0.0],
    [14.6, 10.0, 5.0, 0.0, 2.0, 1.0, 0.0],
    [14.6, 5.0, 1.0, 5.0, 1.0, 0.2, 0.0],  # restarts
    [14.6, 10.0, math.nan, 2.0, 1.0, 0.5, 0.0],
    [math.inf, 10.0, 5.0, 2.0, 1.0, 0.5, 0.0],
    [14.6, 10.0, 5.0, 2.0, 1.0, -0.5],
    [14.6, 10.0, 5.0, 2.0, 1.0, 1.0],
    [0.0, 0.0],
    [5.0, math.nan],
    [*numbers(1000), 0.0],  # leading spacing begins with the same timestep twice
)


@pytest.mark.parametrize("sigmas", NOT_FALLING, ids=lambda sigmas: str(sigmas[:6]))
def test_levels_that_do_not_fall_have_full_steps_only(sigmas: list[float]) -> None:
    assert not falls(sigmas)
    if not falls([*sigmas[:-1], 0.0]):
        for table in TABLES.values():
            assert full_steps(sigmas[:-1], table) == frozenset(range(len(sigmas) - 1))


def test_levels_that_fall() -> None:
    for sigmas in ([], [0.0], [5.0], [5.0, 0.0], [5.0, 4.9999], [*BASE, 0.0], BASE, [5.0, math.nextafter(5.0, 0.0)]):
        assert falls(sigmas)
    assert full_steps([5.0, *[math.nextafter(5.0, 0.0)] * 9], (5.0,)) == set(range(10))


def random_levels(seed: int) -> list[float]:
    """A schedule, whole or a part of it, often with something done to it."""
    chosen = random.Random(seed)
    sigmas = [*numbers(chosen.choice((1, 2, 5, 25, 100))), 0.0]
    begin = chosen.randrange(len(sigmas))
    sigmas = sigmas[begin : begin + chosen.randrange(1, 60)]
    for _ in range(chosen.choice((0, 0, 1, 3))):
        place = chosen.randrange(len(sigmas))
        other = sigmas[chosen.randrange(len(sigmas))]
        sigmas[place] = chosen.choice((other, -1.0, 0.0, math.nan, math.inf, 1e-30, math.nextafter(other, 0.0)))
    return chosen.choice((sigmas, sigmas, sigmas[::-1], sigmas + sigmas))


@each_table
def test_any_list_of_levels_in_any_order(table: tuple[float, ...]) -> None:
    """Never an error; where the list does not fall, or the sampler itself goes back, nothing across the rise."""
    extrapolations = 0
    for seed in range(2000):
        sigmas, chosen = random_levels(seed), random.Random(seed)
        full = full_steps(sigmas[:-1], table)
        assert full <= set(range(len(sigmas) - 1))
        assert len(full) == len(sigmas) - 1 or falls([*sigmas[:-1], 0.0])
        course = Run(sigmas[:-1], full)
        visited = chosen.choice((sigmas[:-1], chosen.sample(sigmas, len(sigmas)), random_levels(seed + 1)))
        computed: list[float] = []
        for sigma in visited:
            if evaluate(course, sigma, 1) is None:
                computed = [*(level for level in computed if level > sigma), sigma]
                continue
            extrapolations += 1
            earlier, later = computed[-2:]
            assert 0 < sigma <= earlier
            assert later < earlier
    assert extrapolations > 1000


def test_a_sampler_that_goes_back_is_computed_in_full() -> None:
    course = run({0, 1})
    for sigma in (16, 8, 4, 2, 1):
        evaluate(course, sigma, 1)
    for sigma in (8, 4, 2, 1):
        assert evaluate(course, sigma, 1) is None
    assert str(course).endswith("guidance: the sampler returned to a higher noise level, as with restarts")


def test_a_look_ahead_is_no_return() -> None:
    """heunpp2 looks two steps ahead."""
    course = run({0, 1, 3})
    for sigma, value in ((16, 10), (8, 8), (2, 4)):
        evaluate(course, sigma, value)
    for sigma, value in ((4, 6), (2, 4)):
        between = evaluate(course, sigma, math.nan)
        assert between is not None
        assert torch.allclose(between, feature(value))
    assert not course.no_reuse


HALVES = [16.0, 8.0, 4.0, 2.0, 1.0, 0.5]


def feature(value: float, parts: int = 1) -> torch.Tensor:
    return torch.full((parts, 2, 1, 1), float(value))


def run(full: set[int], max_error: float = math.inf) -> Run:
    return Run(HALVES, frozenset(full), max_error)


def evaluate(run: Run, sigma: float, value: float, keys: tuple[str, ...] = ("prompt",)) -> torch.Tensor | None:
    """One evaluation of a model whose deep feature is ``value``, and its output, too; what was extrapolated, None where
    it was computed."""
    run.begin(sigma)
    extrapolated = run.extrapolated(keys)
    if extrapolated is None:
        to_check = run.to_check(keys)
        computed = feature(value, len(keys))
        run.store(keys, computed)
        if to_check is not None:
            run.check(keys, range(len(keys)), computed, to_check)
    run.end(1.0)
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


def test_only_a_trend_that_holds_is_extrapolated() -> None:
    steady = run({0, 1, 2}, 0.1)
    values = ((16, 10), (8, 8), (4, 7), (2, 6.5))
    assert [evaluate(steady, sigma, value) is None for sigma, value in values] == [True, True, True, False]
    assert not str(steady).endswith("extrapolate")
    course = run({0, 1, 2}, 0.1)
    others = ((16, 10), (8, 8), (4, 9), (2, 9.6), (1, 10), (0.5, 10.2))
    assert [evaluate(course, sigma, value) is None for sigma, value in others] == [*[True] * 4, False, False]
    assert str(course).startswith("4 of 6 passes ran the full U-Net, 0 with guidance: 1 of them as the features chan")
    broken = run({0, 1, 2}, 0.1)
    assert all(evaluate(broken, sigma, math.nan) is None for sigma in HALVES)


def goes_on(
    scale: float | None, errors: tuple[float, ...], sides: tuple[int, ...] = (0, 1), batch: int = 1, calls: int = 1
) -> bool:
    """Whether features are extrapolated after outputs of 1 were off by an error for each prompt, in the last image of
    a batch. ``calls``: in how many the prompts come."""
    course, keys = run({0, 1, 2}, 0.1), list(range(len(sides)))
    for sigma in HALVES[:3]:
        course.begin(sigma)
        for some in torch.tensor(keys).chunk(calls):
            part = some.tolist()
            course.extrapolated(part)
            assert (course.to_check(part) is None) == (sigma != HALVES[2])
            course.store(part, torch.ones(len(part) * batch, 1, 1, 1))
            off = torch.ones(len(part), batch, 1, 1, 1)
            off[:, -1] += torch.tensor([errors[at] for at in part]).view(-1, 1, 1, 1)
            if sigma == HALVES[2]:
                ones = torch.ones(len(part) * batch, 1, 1, 1)
                course.check(part, [sides[at] for at in part], ones, off.flatten(0, 1))
        course.end(scale)
    course.begin(2.0)
    return course.extrapolated(keys) is not None


def test_an_error_is_a_guided_images() -> None:
    """By one prompt's output alone it would be small; guidance enlarges what the two sides miss differently."""
    assert goes_on(1.0, (0.03, 0.0))
    assert not goes_on(7.5, (0.03, 0.0))
    assert goes_on(7.5, (0.03, 0.03))
    assert not goes_on(7.5, (0.0, 0.03))
    assert not goes_on(7.5, (0.03, 0.0), batch=3), "the worst image of a batch decides"
    assert not goes_on(7.5, (0.0, math.nan))
    assert goes_on(7.5, (0.05, 0.05), calls=2), "a side in a call of its own"
    assert not goes_on(7.5, (0.03, 0.0), calls=2)


def test_several_prompts_do_not_make_up_for_each_other() -> None:
    assert not goes_on(7.5, (0.5, -0.5, 0.0), (0, 0, 1))
    assert not goes_on(7.5, (0.04, 0.02, 0.02, 0.04), (0, 0, 1, 1)), "areas: each with its own negative"
    assert goes_on(7.5, (0.04, 0.02, 0.04, 0.02), (0, 0, 1, 1))


def test_guidance_of_another_kind_is_judged_whichever_side_is_which() -> None:
    assert not goes_on(None, (0.0, 0.03, 0.0), (0, 1, 2))
    assert not goes_on(None, (0.03, 0.0), (0, 0))
    assert goes_on(None, (0.03, 0.03, 0.03), (0, 1, 2))


def test_a_second_look_at_a_level_is_no_check() -> None:
    """heun: it would find no error at all, and forget the one that was found."""
    course = run({0, 1, 2}, 0.1)
    for sigma, value in ((16, 10), (8, 1), (4, 10), (4, 1), (2, 10)):
        assert evaluate(course, sigma, value) is None
    assert "2 of them as the features changed too fast" in str(course)


def test_what_was_not_checked_is_computed_without_a_reason() -> None:
    course = run({0, 1}, 0.1)
    assert [evaluate(course, sigma, 1) is None for sigma in (16, 8, 8, 4, 2)] == [True, True, False, True, False]
    assert str(course) == "3 of 5 passes ran the full U-Net, 0 with guidance"


def test_a_prompt_that_comes_again_is_checked_again() -> None:
    course = run({0, 1}, 0.1)
    for sigma, key in ((16, "a"), (8, "a"), (4, "a"), (2, "b")):
        assert evaluate(course, sigma, 1, (key,)) is None
    assert evaluate(course, 1, 1, ("a",)) is None
    assert evaluate(course, 0.5, 1, ("a",)) is None
    assert str(course).startswith("6 of 6 passes")


def test_what_is_computed_next_in_any_case_is_not_checked() -> None:
    course = run({0, 1, 2, 3}, 0.1)
    checked = []
    for sigma in HALVES:
        course.begin(sigma)
        if course.extrapolated(["prompt"]) is None:
            to_check = course.to_check(["prompt"])
            checked.append(to_check is not None)
            course.store(["prompt"], feature(1))
            if to_check is not None:
                course.check(["prompt"], [0], feature(1), to_check)
        course.end(1.0)
    assert checked == [False, False, False, True]


def test_a_gate_begins_a_trend_anew() -> None:
    """What belongs to features of before it is another key."""
    course = Run(HALVES, frozenset({0, 1}), gates=Gates(frozenset({5.0})))
    found = []
    for sigma in HALVES:
        course.begin(sigma)
        keys = ["prompt", course.phase]
        found.append(course.extrapolated([tuple(keys)]) is None)
        if found[-1]:
            course.store([tuple(keys)], feature(1))
    assert found == [True, True, True, True, False, False]
