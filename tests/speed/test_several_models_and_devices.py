"""KOALA Accelerate where a guider has two MODELs, and where other nodes put a MODEL on other devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualModel

from koala_sdxl.host.accelerate import patch, strategy
from koala_sdxl.host.accelerate.branches import Call
from koala_sdxl.host.accelerate.execution import Execution
from koala_sdxl.host.accelerate.feature_cache import Run
from koala_sdxl.host.accelerate.plan import Acceleration
from koala_sdxl.koala.schedule import schedule
from tests.speed.execution_cases import BALANCED, EXACT, Case, eagerly
from tests.speed.recorders import Operations
from tests.speed.sampling import decibels, prompts, run
from tools.measure import parity

CAPTURED = strategy.Strategy(recorder=Operations)
NEAR = 75.0  # decibels; rounding in fp32


def other_weights() -> Any:
    """A MODEL of koala-tiny's shapes that draws something else."""
    build, arguments = parity.tiny_models()[0].cached_patcher_init
    with torch.inference_mode():
        other = build(*arguments)
        for weights in other.model.diffusion_model.parameters():
            weights.mul_(0.9)
    return other


@pytest.mark.parametrize("settings", [EXACT, BALANCED])
def test_the_negative_prompts_own_model(settings: Acceleration) -> None:
    """Of core's Dual Model CFG Guider: nothing of one network is captured as the other's."""
    negative, texts = other_weights(), prompts()
    sigmas, noise = schedule(8, "leading").sigmas, comfy.sample.prepare_noise(torch.zeros(1, 4, 16, 16), 5)

    def draw(model: Any) -> torch.Tensor:
        guider = Guider_DualModel(model, negative)
        guider.set_conds(*texts)
        guider.set_cfg(4.0)
        sampler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=5)

    case = Case(CAPTURED, NEAR)
    assert decibels(draw(case.faster(settings)), draw(eagerly(parity.tiny_models()[0], settings))) >= NEAR
    assert "by CUDA graph" in case.said[-1]
    assert decibels(draw(parity.tiny_models()[0]), run(parity.tiny_models()[0], texts)) < NEAR


def test_a_model_that_is_put_on_another_kind_of_device_runs_as_comfyui_runs_it() -> None:
    """By a node behind KOALA Accelerate: a CUDA graph of what runs on a CPU is empty."""
    case = Case(dataclasses.replace(CAPTURED, device_type="cuda"), NEAR)
    case.same()
    assert case.said == ["3 passes as in ComfyUI itself: another node has put the MODEL on another kind of device"]


def test_several_gpus_share_the_work_as_comfyui_lets_them() -> None:
    model = parity.tiny_models()[0].clone()
    case = Case(CAPTURED, NEAR)
    accelerated = case.faster(model=model)
    accelerated.set_additional_models("multigpu", [model.clone()])
    guider = comfy.samplers.CFGGuider(accelerated)
    with torch.inference_mode():
        assert Execution(CAPTURED, guider)._why_eager == "several GPUs share the work"
    assert strategy.shares_work(accelerated)
    assert not strategy.shares_work(model)


def test_a_feature_is_of_the_device_that_made_it() -> None:
    """Which of several GPUs computes for a prompt changes from step to step."""

    def key(device: str) -> Any:
        x, text = torch.empty(1, 4, 8, 8, device=device), torch.empty(1, 77, 64)
        call = Call(x, torch.ones(1), text, None, None, {"uuids": ["some"], "cond_or_uncond": [0]})
        return patch._keys(call, Run([], frozenset()))

    assert key("cpu") == key("cpu") != key("meta")


def test_a_second_self_without_dynamic_vram_is_on_the_device_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI counts what it loads by the device of the clone's parent."""
    given: Any = parity.tiny_models()[0].clone()
    monkeypatch.setattr(given, "is_dynamic", lambda: True)
    given.load_device = torch.device("meta")
    parent = strategy.without_dynamic_vram(given).parent
    assert parent is not None
    assert parent.load_device == given.load_device
