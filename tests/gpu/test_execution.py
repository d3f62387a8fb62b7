"""Passes compiled and captured: the CPU's cases on a GPU, with CUDA graphs, and where VRAM is short."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import pytest
import torch

from koala_sdxl.host.accelerate import captured, execution, gpu_vae
from koala_sdxl.host.accelerate.cuda_graphs import CudaGraphs
from koala_sdxl.host.accelerate.plan import PRESETS
from koala_sdxl.host.accelerate.strategy import GIB, Strategy, choose
from koala_sdxl.nodes.speed import KoalaAccelerate
from tests.speed import execution_cases as cases
from tests.speed.execution_cases import SHORT, Case
from tests.speed.sampling import decibels, prompts, run
from tools.measure import parity

CAPTURED = Strategy(recorder=CudaGraphs, device_type="cuda")
BOTH = Strategy(True, CudaGraphs, "cuda")
NEAR = 45.0  # decibels; rounding in fp16


loras = pytest.fixture(cases.put_lora)


@pytest.mark.parametrize("strategy", [CAPTURED, BOTH], ids=["captured", "compiled and captured"])
@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.__name__)
def test_case(case: Callable[[Case], None], strategy: Strategy, loras: None) -> None:
    cases.check(case, strategy, NEAR)


def test_the_vae() -> None:
    cases.the_vae_draws_the_same(Case(BOTH, 40.0))  # it computes in bf16


def test_what_is_chosen_here() -> None:
    choice = choose(parity.tiny_models()[0])
    assert choice.strategy.recorder is CudaGraphs
    assert choice.why_eager == ""
    assert "CUDA graphs" in choice.words


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_draws_what_it_draws_uncaptured(preset: str) -> None:
    model, texts = parity.tiny_models()[0], prompts()
    eager = cases.eagerly(model, PRESETS[preset])
    node = KoalaAccelerate.execute(model, {"preset": preset})
    assert "on this GPU: " in node.ui["text"][0]
    found = run(node.result[0], texts)
    made = execution._find(model.model.diffusion_model)
    assert made is not None
    assert made.captures
    assert decibels(found, run(eager, texts)) >= NEAR


def test_captured_passes_hold_what_a_pass_takes_until_comfyui_unloads() -> None:
    case, plain = Case(BOTH, NEAR), parity.tiny_models()[0]
    large = {"samples": torch.zeros(1, 4, 512, 512)}
    run(plain, preset=SHORT, latent=large)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    run(plain, preset=SHORT, latent=large)
    taken = torch.cuda.max_memory_allocated() - start
    comfy.model_management.soft_empty_cache()
    before = torch.cuda.memory_reserved()
    model = case.faster()
    run(model, preset=SHORT, latent=large)
    comfy.model_management.soft_empty_cache()
    assert 0.1 * GIB < torch.cuda.memory_reserved() - before <= 1.5 * taken
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    assert torch.cuda.memory_reserved() - before <= 0.05 * GIB


def test_where_vram_is_short_it_says_so_and_draws(real_memory: None) -> None:
    comfy.model_management.unload_all_models()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    held = torch.empty(int(free - 1.2 * GIB), dtype=torch.uint8, device="cuda")
    try:
        made = KoalaAccelerate.execute(parity.tiny_models()[0], {"preset": "exact"})
        assert "changes nothing on this machine: " in made.ui["text"][0]
        assert "GiB of VRAM missing for CUDA graphs" in made.ui["text"][0]
        assert run(made.result[0], preset=SHORT).isfinite().all()
    finally:
        del held


def test_more_passes_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stay are right when others are forgotten."""
    monkeypatch.setattr(captured, "MAX_PASSES", 1)
    case = Case(BOTH, NEAR)
    for width in (16, 24, 16, 24):
        case.same(latent={"samples": torch.zeros(1, 4, 16, width)})
        comfy.model_management.soft_empty_cache()
        case.same(latent={"samples": torch.zeros(1, 4, 16, width)})
    assert (len(case.captures), case.captures.count) == (1, 4)


def test_the_vaes_norms_give_channels_last() -> None:
    vae = parity.tiny_models()[2]
    faster, _ = gpu_vae.install(vae)
    orders = []
    layer = vae.first_stage_model.decoder.conv_out
    hook = layer.register_forward_pre_hook(
        lambda _, given: orders.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    try:
        faster.decode(torch.zeros(1, 4, 16, 16))
    finally:
        hook.remove()
    assert orders == [True]


def test_memory_is_given_back_after_a_run_where_little_is_left() -> None:
    case = Case(CAPTURED, NEAR)
    model = case.faster()
    run(model, preset=SHORT)
    assert len(case.captures) == 1
    held = torch.empty(int(torch.cuda.mem_get_info()[0] - 4 * GIB), dtype=torch.uint8, device="cuda")
    try:
        run(model, preset=SHORT)
        assert len(case.captures) == 0
    finally:
        del held
        case.close()
