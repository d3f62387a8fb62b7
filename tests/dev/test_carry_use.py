"""How images are drawn with the LoRA that is carried over: steps, guidance and spacing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from koala_sdxl.distill.carry import run, source
from koala_sdxl.distill.carry.run import Prompts, sampled
from koala_sdxl.distill.carry.samples import STUDENT, TEACHER, Samples, alone, drawn
from koala_sdxl.distill.carry.settings import PER_DRAWING, Settings
from koala_sdxl.koala.files.conventions import CARRY_KEY
from tests.dev import carry_runs
from tests.dev.carry_runs import carried, settings, texts

place = pytest.fixture(scope="module")(carry_runs.place)
FEW_STEPS = {"draw_steps": 4, "cfg": 1.0, "spacing": "trailing"}
TRAILING = {999, 749, 499, 249}
"""Time steps of four, trailing."""
USED, KEPT = 6, 4


def of_student(given: Settings) -> Samples:
    """The samples of the KOALA by itself."""
    opened = source.open_source(given)
    prompts = Prompts(dict.fromkeys(range(USED), ""), dict.fromkeys(range(KEPT), ""))
    return sampled(given, opened, prompts, texts(USED + KEPT), source.student_unet(opened), alone, STUDENT)


@pytest.mark.parametrize("steps", [1, 4, 5, 25])
@pytest.mark.parametrize("samples", [8, 17, 256])
def test_each_drawing_has_as_many_steps_as_samples_are_taken_of_it(place: Path, steps: int, samples: int) -> None:
    given = settings(place, "x", draw_steps=steps, samples=samples)
    for rows, count in zip(drawn(given, USED, KEPT), (given.samples, given.held_out), strict=True):
        own, taken = (count + 1) // 2, min(PER_DRAWING, steps)
        assert taken * (len(rows) - 1) < own <= taken * len(rows)


def test_few_steps_without_guidance_never_meet_the_empty_prompt(place: Path) -> None:
    given = settings(place, "x", **FEW_STEPS, samples=40, batch=2)
    found = of_student(given)
    assert len(found.noisy) == len(found.time) == len(found.text) == given.samples // 2 + given.held_out // 2
    assert set(found.time.tolist()) == TRAILING
    assert USED + KEPT not in found.text
    assert (found.kept == (found.text >= USED)).all()
    first = found.noisy[found.time == 999].flatten(1)
    assert len({tuple(row) for row in first.tolist()}) == len(first)  # each row's own noise


def test_with_guidance_the_same_noise_is_met_and_the_empty_prompt(place: Path) -> None:
    given = settings(place, "x", **FEW_STEPS, samples=40)
    without, with_guidance = of_student(given), of_student(replace(given, cfg=3.0))
    assert USED + KEPT in with_guidance.text
    first, guided = (one.noisy[one.time == 999] for one in (without, with_guidance))
    torch.testing.assert_close(first, guided)
    later, guided = (one.noisy[one.time == 249] for one in (without, with_guidance))
    assert (later - guided).abs().max() > 1e-2


def test_the_plan_tells_how_images_are_drawn(place: Path) -> None:
    told = "\n".join(carried(place, "x", **FEW_STEPS, samples=40, check=True))
    assert "samples: 50, from 7 images that each network draws in 4 steps, cfg 1, trailing" in told
    assert re.search(r"SDXL, in fp32, on \w+: 128 forward passes", told)  # 7 * 4, and each sample twice
    guided = "\n".join(carried(place, "x", samples=40, check=True))
    assert "samples: 50, from 3 images that each network draws in 25 steps, cfg 7.5, leading" in guided
    assert re.search(r"SDXL, in fp32, on \w+: 250 forward passes", guided)  # 2 * 3 * 25, and each sample twice


@pytest.mark.nightly
def test_a_few_step_lora_is_carried_over(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROUNDS", 1)
        seen: dict[int, Samples] = {}

        def watched(*given: object) -> Samples:
            seen[given[-1]] = sampled(*given)  # type: ignore[arg-type, index]
            return seen[given[-1]]  # type: ignore[index]

        patch.setattr(run, "sampled", watched)
        carried(place, "few", **FEW_STEPS, method="fit")
    assert seen.keys() == {STUDENT, TEACHER}
    assert all(set(samples.time.tolist()) <= TRAILING for samples in seen.values())
    with safe_open(place / "few.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()[CARRY_KEY])
    assert said["settings"].items() >= FEW_STEPS.items()
    assert said["shares"]["lineage"] < said["shares"]["fit"]
