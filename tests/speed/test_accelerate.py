"""KOALA Accelerate in ComfyUI: exact where it says so, near where not, and never with another run's features."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.hooks
import comfy.samplers
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import CFGOverride, FlipSigmas, SamplerCustom, SplitSigmas
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_freelunch import FreeU_V2

from koala_sdxl.host.accelerate import patch as module
from koala_sdxl.host.accelerate.feature_cache import Run
from koala_sdxl.host.accelerate.plan import OFF, REUSE, Acceleration, Reuse, Table
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, Layout, name
from koala_sdxl.koala.schedule import schedule
from koala_sdxl.nodes.adapt import KoalaControlNet
from koala_sdxl.nodes.lora import KoalaLoraLoader
from tests.speed import execution_cases, sampling
from tests.speed.sampling import ALL_FULL, BALANCED, BASE, Said, alone, decibels, pictures, plain, prompts, run
from tools.measure import parity, transfer
from tools.measure.bench.image_quality import psnr
from tools.tiny.evaluate import grid_prompts

SHALLOW = 0.036  # of a full pass, what a step on extrapolated features computes, at KOALA-700M's size

said = pytest.fixture(sampling.said)
faster = pytest.fixture(sampling.faster)
loras = pytest.fixture(execution_cases.put_lora)


# Full steps change nothing


@pytest.mark.parametrize("koala", [KOALA_700M, KOALA_1B], ids=name)
def test_the_two_branches_are_the_full_unet(koala: Layout, faster: Callable[..., Any], said: Said) -> None:
    model = FreeU_V2.execute(transfer.pair(koala)[1], 1.3, 1.4, 0.9, 0.2).result[0]
    control = KoalaControlNet.execute(transfer.controlnet()).result[0]
    texts = transfer.conditioning(transfer.small(koala), transfer.hinted(control))
    wanted = transfer.sample(model, texts, steps=3)
    assert torch.equal(transfer.sample(faster(ALL_FULL, model), texts, steps=3), wanted)
    assert said.full == 3
    assert not torch.equal(
        transfer.sample(faster(Acceleration(OFF, Reuse(Table((0.01,)))), model), texts, steps=4), wanted
    )


def test_patches_hear_the_numbers_of_the_whole(faster: Callable[..., Any]) -> None:
    def heard(settings: Acceleration | None) -> list[Any]:
        found: list[Any] = []

        def patch(h: Any, skip: Any, options: dict[str, Any]) -> Any:
            found.append((options["block"], tuple(h.shape), tuple(skip.shape)))
            return h, skip

        model = parity.tiny_models()[0].clone()
        model.set_model_output_block_patch(patch)
        run(faster(settings, model) if settings else model, preset=BASE | {"steps": 1})
        return found

    assert heard(ALL_FULL) == heard(None)
    assert len(heard(None)) == 6


def test_the_given_model_stays_as_it_is(faster: Callable[..., Any]) -> None:
    before = plain()
    run(faster())
    assert torch.equal(plain(), before)
    unet = parity.tiny_models()[0].model.diffusion_model
    assert unet.middle_block is None
    assert len(unet.input_blocks) == len(unet.output_blocks) == 6


# Features used again


@pytest.mark.nightly
def test_presets_keep_the_pictures(faster: Callable[..., Any], said: Said) -> None:
    """Bounds are docs/benchmarks.md's, on a third of its prompts; fewer steps on some of these."""
    grid = grid_prompts(216)[0][5::3]
    texts, some = prompts(grid), prompts(grid[:18])  # noise is drawn picture by picture: the first have the same
    wanted = pictures(plain(texts))
    for preset, full, bound, as_dear, margin in (("balanced", 13, 39, 14, 6), ("fast", 11, 33, 12, 2.5)):
        said.clear()
        found = pictures(alone(faster(Acceleration(OFF, REUSE[preset])), texts))
        assert said.mean_full <= full
        assert psnr(found, wanted) >= bound
        fewer = pictures(plain(some, preset=BASE | {"steps": as_dear}))
        assert psnr(found[:18], wanted[:18]) >= psnr(fewer, wanted[:18]) + margin


BY_DAY = ("sample_euler", "sample_heun", "sample_dpmpp_2m")
"""One evaluation a step, two, and one that looks back."""


@pytest.mark.parametrize(
    ("sampler", "every"),
    [
        *((sampler, 108) for sampler in BY_DAY),
        *(
            pytest.param(sampler, 54, marks=pytest.mark.nightly)
            for sampler in sorted(module.SINGLE_STEP_SAMPLERS | module.MULTISTEP_SAMPLERS)
        ),
    ],
)
def test_every_deterministic_sampler(sampler: str, every: int, faster: Callable[..., Any], said: Said) -> None:
    """Better than fewer steps of the same sampler that are as dear."""
    name = sampler.removeprefix("sample_")
    texts = prompts(grid_prompts(216)[0][5::every])
    found = pictures(alone(faster(), texts, sampler_name=name))
    wanted = pictures(plain(texts, sampler_name=name))
    assert said.mean_full < said.passes * (1 if sampler in module.MULTISTEP_SAMPLERS else 0.7)
    cost = 25 * (said.mean_full + SHALLOW * (said.passes - said.mean_full)) / said.passes
    below, above = (
        psnr(pictures(plain(texts, sampler_name=name, preset=BASE | {"steps": int(cost) + more})), wanted)
        for more in (0, 1)
    )
    assert psnr(found, wanted) > below + (above - below) * (cost % 1)


def test_every_number_of_steps(faster: Callable[..., Any], said: Said) -> None:
    texts = prompts(grid_prompts(216)[0][5::108])
    for steps in (1, 2, 5, 10, 50):
        preset = BASE | {"steps": steps}
        assert decibels(run(faster(), texts, preset=preset), plain(texts, preset=preset)) >= 35
    assert said.full < 20


def test_image_to_image_and_masks(faster: Callable[..., Any], said: Said) -> None:
    """It warms up with full steps, too, at whichever noise level it begins."""
    texts = prompts(grid_prompts(216)[0][5::108])
    latent = {"samples": plain(prompts(grid_prompts(216)[0][7::108]))}
    found, wanted = (sampled(texts, latent=latent, denoise=0.6) for sampled in (partial(run, faster()), plain))
    assert said.passes == 15
    assert said.full < 13
    assert decibels(found, wanted) >= 33
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    masked = latent | {"noise_mask": mask}
    found = run(faster(), texts, latent=masked)
    assert decibels(found, plain(texts, latent=masked)) >= 35
    assert torch.allclose(found[..., :7], latent["samples"][..., :7], atol=1e-4)


def test_loras_upstream_and_downstream(faster: Callable[..., Any], loras: None) -> None:
    model, clip, _ = parity.tiny_models()

    def with_lora(given: Any) -> Any:
        return KoalaLoraLoader.execute(given, clip, "some.safetensors", 0.1, 1.0, "auto", 0.0).result[0]

    wanted = run(with_lora(model))
    assert not torch.equal(wanted, plain())
    found = run(faster(BALANCED, with_lora(model)))
    assert torch.equal(found, run(with_lora(faster())))
    assert decibels(found, wanted) >= 35


def test_a_controlnet_that_ends_is_not_carried_on(faster: Callable[..., Any], said: Said) -> None:
    """Where it stops, the features before and after have nothing to do with each other."""
    model = transfer.pair(KOALA_700M)[1]
    control = KoalaControlNet.execute(transfer.controlnet()).result[0]
    layout = transfer.small(KOALA_700M)
    whole = transfer.conditioning(layout, transfer.hinted(control))
    transfer.sample(faster(BALANCED, model), whole, steps=25)
    without_end = said.full
    ending = transfer.hinted(control)
    ending.timestep_percent_range = (0.0, 0.35)
    transfer.sample(faster(BALANCED, model), transfer.conditioning(layout, ending), steps=25)
    assert without_end < said.full <= without_end + 2


def test_a_lora_that_is_scheduled_is_not_carried_on(faster: Callable[..., Any], said: Said, loras: None) -> None:
    hooks = execution_cases.scheduled_lora(0.1, (1.0, 0.0), (0.0, 0.5))
    texts = tuple(comfy.hooks.set_hooks_for_conditioning(side, hooks) for side in prompts())
    wanted, found = plain(texts), run(faster(), texts)
    assert said.full > 12
    assert decibels(found, wanted) >= 33


# Guidance


def test_outside_the_interval_only_the_prompt_is_computed(faster: Callable[..., Any], said: Said) -> None:
    found = run(faster(Acceleration(OFF, guided=(0.0, 0.6))))
    assert said[-1].startswith("25 of 25 passes ran the full U-Net, 15 with guidance")
    stock = CFGOverride.execute(parity.tiny_models()[0], 1.0, 0.6, 1.0).result[0]
    assert torch.equal(found, run(stock))
    both = run(faster(Acceleration(OFF, REUSE["balanced"], (0.2, 0.6))))
    assert "10 with guidance" in said[-1]
    assert not torch.equal(both, found)


def test_what_needs_the_negative_prompt_gets_it(faster: Callable[..., Any], said: Said) -> None:
    model = parity.tiny_models()[0].clone()
    model.set_model_sampler_cfg_function(lambda given: given["uncond"] + 3 * (given["cond"] - given["uncond"]))
    wanted = run(model)
    assert torch.equal(run(faster(Acceleration(OFF, guided=(0.0, 0.5)), model)), wanted)
    assert "25 with guidance" in said[-1]


# Other nodes


@pytest.mark.nightly
def test_a_compiled_model_reuses_as_well(faster: Callable[..., Any], said: Said) -> None:
    wanted = run(faster(), preset=BASE | {"steps": 15})
    compiled = faster().clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert torch.equal(run(compiled, preset=BASE | {"steps": 15}), wanted)
    assert said[-1] == said[-2]
    assert said.full < 15


# Where it cannot be right


def custom(
    model: Any,
    sigmas: torch.Tensor,
    sampler: str,
    latent: torch.Tensor | None = None,
    noise: bool = True,
    cfg: float = 7.5,
) -> torch.Tensor:
    """SamplerCustom's latents."""
    samples = {"samples": torch.zeros(1, 4, 16, 16) if latent is None else latent}
    positive, negative = prompts()
    chosen = comfy.samplers.ksampler(sampler)
    made = SamplerCustom.execute(model, noise, 1, cfg, positive, negative, chosen, sigmas, samples)
    return made.result[0]["samples"]


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "lcm", "ddpm", "dpm_adaptive", "uni_pc"]
)
def test_other_samplers_run_full_steps_and_say_so(sampler: str, faster: Callable[..., Any], said: Said) -> None:
    shorter = BASE | {"steps": 6}
    assert torch.equal(run(faster(), sampler_name=sampler, preset=shorter), plain(sampler_name=sampler, preset=shorter))
    assert sampler.replace("uni_pc", "unipc") in said[-1]
    assert "draws noise between steps, or is not known to tolerate cached steps" in said[-1]


def test_churn_runs_full_steps(faster: Callable[..., Any], said: Said) -> None:
    sampler = comfy.samplers.ksampler("euler", {"s_churn": 2.0})
    positive, negative = prompts()
    sigmas = schedule(6, "leading").sigmas
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    SamplerCustom.execute(faster(), True, 1, 7.5, positive, negative, sampler, sigmas, latent)
    assert "s_churn" in said[-1]
    assert said.full == 6


FALLING = schedule(12, "leading").sigmas


@pytest.mark.parametrize(
    "sigmas",
    [
        FlipSigmas.execute(FALLING).result[0],
        torch.cat([FALLING[:6], FALLING[5:]]),
        torch.cat([FALLING[:6], torch.zeros(1), FALLING[6:]]),
        torch.cat([FALLING[:8], FALLING[3:]]),
        torch.cat([FALLING[:6], torch.tensor([torch.nan]), FALLING[6:]]),
        torch.cat([FALLING[:6], FALLING[5:6]]),
        torch.tensor([FALLING[4]] * 2),
    ],
    ids=["flipped", "equal", "zero inside", "rises again", "NaN", "equal at the end", "one step of no length"],
)
@pytest.mark.parametrize("sampler", ["euler", pytest.param("dpmpp_2m", marks=pytest.mark.nightly)])
def test_levels_that_do_not_fall_run_full_steps(
    sigmas: torch.Tensor, sampler: str, faster: Callable[..., Any], said: Said
) -> None:
    wanted = custom(parity.tiny_models()[0], sigmas, sampler)
    found = custom(faster(), sigmas, sampler)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))  # bit for bit, NaN too
    assert said.full == said.passes == len(sigmas) - 1
    assert said[-1].endswith(": the noise levels do not fall from step to step, as in unsampling")


def test_parts_of_a_schedule(faster: Callable[..., Any], said: Said) -> None:
    """Split Sigmas: each part is a run; one of four steps and fewer is full."""
    sigmas = schedule(25, "leading").sigmas
    for part, full in ((sigmas[:1], 0), (sigmas[:2], 1), (sigmas[-2:], 1), (sigmas[:5], 4), (sigmas[20:], 5)):
        wanted, found = (custom(model, part, "euler") for model in (parity.tiny_models()[0], faster()))
        assert torch.equal(found, wanted)
        assert said.full == said.passes == full
    high, low = SplitSigmas.execute(sigmas, 12).result
    middle = custom(parity.tiny_models()[0], high, "euler")
    wanted, found = (custom(model, low, "euler", middle, noise=False) for model in (parity.tiny_models()[0], faster()))
    assert said.full < said.passes == 13
    assert decibels(found, wanted) >= 39


def test_unsampling_and_back(faster: Callable[..., Any], said: Said) -> None:
    """An image up to noise by flipped sigmas, and down again: the way up is computed in full."""
    start, sigmas = plain(), schedule(25, "leading").sigmas
    flipped = FlipSigmas.execute(sigmas[5:]).result[0]
    wanted, found = (
        custom(model, flipped, "euler", start, noise=False, cfg=1.0) for model in (parity.tiny_models()[0], faster())
    )
    assert torch.equal(found, wanted)
    assert said.full == said.passes


def test_tiled_and_wrapped_sampling_runs_full_steps(faster: Callable[..., Any], said: Said) -> None:
    model = parity.tiny_models()[0].clone()
    model.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    assert torch.equal(run(faster(BALANCED, model)), plain())
    assert "model_function_wrapper" in said[-1]


def test_not_twice_and_not_with_easycache(faster: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="already accelerated by KOALA Accelerate; expected one that is not"):
        faster(BALANCED, faster())
    with pytest.raises(ValueError, match="EasyCache as well as KOALA Accelerate"):
        faster(BALANCED, EasyCacheNode.execute(parity.tiny_models()[0], 0.2, 0.15, 0.95, False).result[0])
    with pytest.raises(ValueError, match="EasyCache as well as KOALA Accelerate"):
        run(EasyCacheNode.execute(faster(), 0.2, 0.15, 0.95, False).result[0])


# State is a run's own


def test_runs_know_nothing_of_each_other(faster: Callable[..., Any]) -> None:
    model, green = faster(), prompts(["a green star on a blue background"])
    alone = run(faster(), green)
    run(model)
    assert torch.equal(run(model, green), alone)
    wide = {"samples": torch.zeros(2, 4, 16, 24)}
    run(model, latent=wide)
    assert torch.equal(run(model, green), alone)


def test_a_cancelled_run_leaves_nothing(faster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[weakref.ref[Run]] = []

    class Watched(Run):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            runs.append(weakref.ref(self))

        def begin(self, time: float) -> None:
            super().begin(time)
            if len(runs) == 1 and self.evaluations == 9:
                raise InterruptProcessingException

    monkeypatch.setattr(module, "Run", Watched)
    model = faster()
    with pytest.raises(InterruptProcessingException):
        run(model)
    found = run(model)
    gc.collect()
    assert [made() for made in runs] == [None, None]
    monkeypatch.undo()
    assert torch.equal(found, run(faster()))
