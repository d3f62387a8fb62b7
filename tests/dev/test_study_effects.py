"""distill/study/effects: its drawings, its judges, and adapters that the pack's inspectors read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_sdxl.distill.study.effects import training
from koala_sdxl.distill.study.effects.measure import JUDGED, KEEP, PROMPTS, some
from koala_sdxl.distill.study.effects.table import EFFECTS, FRAMED, PLAIN, STRIPED, TINY, TUNED, Effect, asked, plain
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.lora.plan import inspect_lora
from tools.measure import reference
from tools.tiny import SHIPPED, denoiser, pipeline
from tools.tiny.grow import SDXL_TINY
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, draw, random_drawings

DRAWINGS = random_drawings(90, torch.Generator().manual_seed(5))
FEW: dict[str, Any] = {"steps": 2, "batch": 2, "size": 64, "drawings": 4, "warm": 1}


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.name)
def test_an_effect_is_seen_where_it_is_and_nowhere_else(effect: Effect) -> None:
    shapes, backs = ([every.index(name) for name in names] for every, names in _seen_with(effect))
    some = DRAWINGS.pick(
        torch.isin(DRAWINGS.shape, torch.tensor(shapes)) & torch.isin(DRAWINGS.background, torch.tensor(backs))
    )
    assert effect.seen(effect.drawn(some, 128), some).float().mean() > 0.8
    assert not effect.seen(draw(some, 128), some).any()
    others = [other for other in EFFECTS if other.drawn is not effect.drawn]
    for other in others:
        assert effect.seen(other.drawn(some, 128), some).float().mean() < 0.05, other.name


def _seen_with(effect: Effect) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    return (SHAPE_NAMES, effect.shapes), (COLOUR_NAMES, effect.backgrounds)


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.name)
def test_another_thing_than_what_was_asked_for_is_not_right(effect: Effect) -> None:
    made = effect.drawn(DRAWINGS, 128)
    for name, number in (("shape", len(SHAPE_NAMES)), ("background", len(COLOUR_NAMES))):
        other = replace(DRAWINGS, **{name: (getattr(DRAWINGS, name) + 1) % number})
        assert effect.seen(made, other).float().mean() < 0.1


def test_no_prompt_that_is_learned_from_is_judged() -> None:
    for effect in (*EFFECTS, PLAIN):
        for seed in range(3):
            learned = {*some(effect, False, PROMPTS, seed), *some(PLAIN, False, KEEP, seed)}
            judged = some(effect, True, JUDGED, seed)
            assert len(set(judged)) == JUDGED
            assert not learned & set(judged)
    field = (4, 5, 0)
    assert STRIPED.said(plain(field)) == "a striped orange star on a red background"
    assert TUNED.said(plain(field)) == plain(field).text == "an orange star on a red background"
    assert asked([field]).shape.tolist() == [4]


@pytest.mark.parametrize("effect", [TINY, FRAMED], ids=lambda effect: effect.name)
def test_an_adapter_is_trained_and_read(effect: Effect, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    training.train(_teacher(), replace(effect, recipe=replace(effect.recipe, **FEW)), path, print)
    plan = inspect_lora(path, KOALA_TINY)
    assert plan.origin
    assert plan.origin.model == "SDXL"
    assert plan.count("applied")
    assert plan.count("unknown") == 0
    assert bool(plan.text) == effect.texts
    assert bool([module for module in plan.modules if "in_layers" in module.target]) == ("conv1" in effect.modules)


def test_a_fine_tune_is_a_folder_with_other_weights(tmp_path: Path) -> None:
    teacher = _teacher()
    before = {name: weight.clone() for name, weight in teacher.unet.state_dict().items()}
    training.train(teacher, replace(TUNED, recipe=replace(TUNED.recipe, **FEW)), tmp_path / "tuned", print)
    after = pipeline.load(tmp_path / "tuned").unet.state_dict()
    assert after.keys() == before.keys()
    assert sum(not torch.equal(after[name], before[name].half().float()) for name in after) > len(after) / 2


def _teacher() -> Any:
    """sdxl-tiny with a random U-Net."""
    torch.manual_seed(0)
    made = reference.pipeline(SHIPPED)
    made.unet = denoiser.new_unet(SDXL_TINY)
    return made
