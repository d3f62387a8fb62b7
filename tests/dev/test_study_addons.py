"""distill/study/addons: its judges, a few steps of both trainings, and files that our nodes' inspectors read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors import safe_open

from koala_sdxl.distill.study import addon_training
from koala_sdxl.distill.study.addon_pictures import in_cyan, judge_cyan, outlines, overlaps, saying_cyan, silhouettes
from koala_sdxl.distill.study.addon_training import CONTROLNET
from koala_sdxl.distill.study.effects import training
from koala_sdxl.distill.study.effects.table import ATTENTION, CYAN
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.lora.plan import inspect_lora
from tools.harness import inprocess
from tools.measure import reference
from tools.synthetic import adapters
from tools.tiny import SHIPPED, denoiser
from tools.tiny.grow import SDXL_TINY
from tools.tiny.pictures import COLOUR_NAMES, KOALA, draw, random_drawings

FEW = {"steps": 3, "batch": 2, "size": 64, "drawings": 4, "warm": 1}
DRAWINGS = random_drawings(72, torch.Generator().manual_seed(5))


@pytest.fixture
def teacher() -> Any:
    """sdxl-tiny with a random U-Net."""
    torch.manual_seed(0)
    made = reference.pipeline(SHIPPED)
    made.unet = denoiser.new_unet(SDXL_TINY)
    return made


def test_cyan_is_told_from_other_colours() -> None:
    cyan, plain = judge_cyan(in_cyan(DRAWINGS, 128)), judge_cyan(draw(DRAWINGS, 128))
    assert cyan.cyan.float().mean() >= 0.99
    assert not plain.cyan.any()
    assert plain.share.max() < 0.2
    for name in ("background", "shape"):
        assert (getattr(cyan, name) == getattr(DRAWINGS, name)).float().mean() >= 0.97


def test_cyan_stays_inside_its_shape() -> None:
    changed = (in_cyan(DRAWINGS, 64) - draw(DRAWINGS, 64)).abs().sum(1, keepdim=True) > 0.05
    assert (silhouettes(DRAWINGS, 64)[changed] > 0).all()


def test_captions_say_cyan_in_the_place_of_a_shapes_colour_alone() -> None:
    orange, white = (COLOUR_NAMES.index(name) for name in ("orange", "white"))
    assert saying_cyan("an orange star on a red background", orange) == "a cyan star on a red background"
    assert saying_cyan("white ring", white) == "cyan ring"


def test_overlap_is_one_for_the_drawing_itself_and_low_elsewhere() -> None:
    pictures = draw(DRAWINGS, 128)
    assert overlaps(pictures, DRAWINGS).min() > 0.8
    away = replace(DRAWINGS, x=DRAWINGS.x + 0.6)
    assert overlaps(pictures, away).max() < 0.7
    empty = torch.zeros_like(pictures[:4])
    assert overlaps(empty, DRAWINGS.pick(torch.arange(4))).tolist() == [0, 0, 0, 0]


def test_outlines_are_thin_lines_around_whole_shapes() -> None:
    lines = outlines(DRAWINGS, 128)
    assert lines.shape == (72, 3, 128, 128)
    assert (lines.min(), lines.max()) == (0, 1)
    assert 0.01 < lines.mean() < 0.1
    koalas = DRAWINGS.pick(DRAWINGS.shape == KOALA)
    koalas = replace(koalas, x=0 * koalas.x, y=0 * koalas.y)
    assert (silhouettes(koalas, 128)[:, :, 60:90, 60:68] == 1).all()  # the nose is no hole


@pytest.mark.nightly
def test_a_lora_is_trained_and_read(teacher: Any, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    recipe = replace(replace(CYAN.recipe, **FEW), steps=25, batch=4, learning_rate=2e-2)
    effect = replace(CYAN, recipe=recipe)
    loss = training.loss(teacher, effect, 0)

    def mean() -> float:
        return sum(float(loss(torch.Generator().manual_seed(seed)).detach()) for seed in range(1, 5)) / 4

    before = mean()
    training.train(teacher, effect, path, print)
    assert mean() < before
    assert [file.name for file in tmp_path.iterdir()] == ["lora.safetensors"]
    plan = inspect_lora(path, KOALA_TINY)
    assert plan.origin
    assert plan.origin.model == "SDXL"
    trained = tuple(f".{module}.weight" for module in ATTENTION)
    part, whole = (
        sum(tensor.diffusers.endswith(trained) for tensor in adapters.tensors(layout))
        for layout in (KOALA_TINY, SDXL_TINY)
    )
    assert (plan.count("applied"), plan.count("removed")) == (part, whole - part)
    assert len(plan.modules) == whole


def test_a_controlnet_is_trained_and_loaded_by_core(teacher: Any, tmp_path: Path) -> None:
    recipe, path = replace(CONTROLNET, **FEW), tmp_path / "controlnet.safetensors"
    control = addon_training.new_controlnet(teacher, 0)
    loss = addon_training.outline_loss(teacher, addon_training.by_controlnet(control), recipe, 0)
    before = loss(torch.Generator().manual_seed(1))
    addon_training.minimise(loss, control.parameters(), recipe, 5, 0, print)
    assert loss(torch.Generator().manual_seed(1)) < before
    addon_training.save_controlnet(control, path)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(adapters.controlnet(addon_training.CONTROLNET_LAYOUT))
    inprocess.activate()
    import comfy.controlnet

    loaded = comfy.controlnet.load_controlnet(str(path))
    _same_residuals(control.half().float(), loaded.control_model)  # the file is in fp16


@torch.no_grad()
def _same_residuals(control: ControlNetModel, core: Any) -> None:
    """diffusers' ControlNet and core's from its file give the same."""
    generator = torch.Generator().manual_seed(2)
    noisy, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 96, generator=generator)
    hint, time = torch.rand(1, 3, 64, 64, generator=generator), torch.tensor([400])
    pooled, sizes = torch.randn(1, 64, generator=generator), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    added = {"text_embeds": pooled, "time_ids": sizes}
    down, middle = control(noisy, time, context, hint, added_cond_kwargs=added, return_dict=False)
    vector = torch.cat([pooled, control.add_time_proj(sizes.flatten()).reshape(1, -1)], dim=1)
    found = core.float()(x=noisy, hint=hint, timesteps=time, context=context, y=vector)
    for ours, theirs in zip([*down, middle], [*found["output"], *found["middle"]], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    assert middle.abs().max() > 0
