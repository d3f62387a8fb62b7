"""KOALA Accelerate behind patches that act in a part of the noise schedule only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import comfy.controlnet
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

from koala_sdxl.host.accelerate.gates import MOST_OBJECTS, gates
from koala_sdxl.host.accelerate.plan import OFF, REUSE, Acceleration, Gates
from tests.speed import sampling
from tests.speed.sampling import BASE, Said, alone, pictures, prompts, run
from tools.measure import parity
from tools.measure.bench.image_quality import psnr
from tools.tiny.evaluate import grid_prompts

SHALLOW = 0.036  # of a full pass, what a step on extrapolated features computes, at KOALA-700M's size

said = pytest.fixture(sampling.said)
faster = pytest.fixture(sampling.faster)


class ImageTokens:
    """Attention to a second prompt beside the first, from a start to an end: what an IP-Adapter does with an image."""

    def __init__(self, unet: Any, tokens: torch.Tensor, weight: float, sigma_start: float, sigma_end: float) -> None:
        self.unet = unet
        self.settings: list[dict[str, Any]] = [
            {"weight": weight, "sigma_start": sigma_start, "sigma_end": sigma_end, "tokens": tokens}
        ]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        out = optimized_attention(q, k, v, options["n_heads"])
        sigma = options["sigmas"].detach().cpu()[0].item()
        for settings in self.settings:
            if settings["sigma_end"] <= sigma <= settings["sigma_start"]:
                name, number = options["block"]
                blocks = {"input": self.unet.input_blocks, "output": self.unet.output_blocks}[name][number]
                (transformer,) = (block for block in blocks if hasattr(block, "transformer_blocks"))
                layer = transformer.transformer_blocks[options["block_index"]].attn2
                tokens = settings["tokens"].expand(len(q), -1, -1)
                added = optimized_attention(q, layer.to_k(tokens), layer.to_v(tokens), options["n_heads"])
                side = torch.tensor(options["cond_or_uncond"]).repeat_interleave(
                    len(q) // len(options["cond_or_uncond"])
                )
                out = out + settings["weight"] * added * (side == 0).view(-1, 1, 1)
        return out


def with_image(weight: float, start: float, end: float) -> Any:
    """koala-tiny with image tokens of another prompt in all its cross attention."""
    model = parity.tiny_models()[0].clone()
    unet, sampling_ = model.model.diffusion_model, model.get_model_object("model_sampling")
    tokens = prompts(["a blue square on a black background"])[0][0][0]
    patch = ImageTokens(unet, tokens, weight, sampling_.percent_to_sigma(start), sampling_.percent_to_sigma(end))
    for name, blocks in (("input", unet.input_blocks), ("output", unet.output_blocks)):
        for number, block in enumerate(blocks):
            for part in block:
                for index in range(len(getattr(part, "transformer_blocks", ()))):
                    model.set_model_attn2_replace(patch, name, number, index)
    return model


@pytest.mark.parametrize(
    ("weight", "start", "end", "preset", "every"),
    [
        (0.3, 0.0, 0.5, "fast", 108),
        (1.0, 0.3, 0.7, "balanced", 108),
        *(
            pytest.param(*case, 54, marks=pytest.mark.nightly)
            for case in (
                (0.3, 0.3, 0.7, "balanced"),
                (0.3, 0.0, 0.5, "fast"),
                (1.0, 0.3, 0.7, "balanced"),
                (1.0, 0.5, 1.0, "fast"),
                (1.0, 0.0, 1.0, "fast"),
            )
        ),
    ],
)
def test_not_below_fewer_steps_as_dear(
    weight: float, start: float, end: float, preset: str, every: int, faster: Callable[..., Any], said: Said
) -> None:
    """All of docs/speed.md's table were measured; these are the hardest, and two usual ones; by day one of each."""
    model, texts = with_image(weight, start, end), prompts(grid_prompts(216)[0][5::every])
    wanted = pictures(run(model, texts))
    found = psnr(pictures(alone(faster(Acceleration(OFF, REUSE[preset]), model), texts)), wanted)
    cost = said.mean_full + SHALLOW * (25 - said.mean_full)
    below, above = (
        psnr(pictures(run(model, texts, preset=BASE | {"steps": int(cost) + more})), wanted) for more in (0, 1)
    )
    assert found >= below + (above - below) * (cost % 1)


def test_a_patch_that_changes_where_nobody_knows_runs_full_steps(faster: Callable[..., Any], said: Said) -> None:
    def fading(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> Any:
        return q * (1 + options["sigmas"][0] / 50), k, v

    model = parity.tiny_models()[0].clone()
    model.set_model_attn2_patch(fading)
    assert torch.equal(run(faster(model=model)), run(model))
    assert said.full == 25
    assert "fading) changes with the noise level; where is not known" in said[-1]


def test_deep_shrink_is_seen_where_it_ends(faster: Callable[..., Any], said: Said) -> None:
    model = PatchModelAddDownscale.execute(
        parity.tiny_models()[0], 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic"
    ).result[0]
    run(faster(model=model))
    assert 12 < said.full < 25
    assert psnr(pictures(run(faster(model=model))), pictures(run(model))) >= 30


def test_patches_that_do_not_read_the_noise_level_cost_little(faster: Callable[..., Any], said: Said) -> None:
    model = FreeU_V2.execute(parity.tiny_models()[0], 1.01, 1.02, 0.99, 0.95).result[0]
    run(faster(model=model))
    assert said.full <= 15


# What is read from patches


def percent_to_sigma(percent: float) -> float:
    return 10 * (1 - percent)


def found(patch: Any) -> Gates:
    return gates({"patches": {"attn2_patch": [patch]}}, {}, percent_to_sigma)


def closure(sigma_start: float, until_percent: float) -> Callable[..., Any]:
    def patch(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        return (q, k, v) if options["sigmas"][0] > sigma_start else until_percent

    return patch


def plain_numbers(strength: float, end: float) -> Callable[..., Any]:
    def patch(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        return q * strength, k, v + end

    return patch


def with_arguments(
    q: Any, options: dict[str, Any], start: float = 0.25, weight: float = 3.0, *, stop: float = 2.5
) -> Any:
    return q * weight if start < options["sigmas"][0] < stop else q


def calls_another(q: Any, options: dict[str, Any]) -> Any:
    return with_arguments(q, options)


class Keyframes:
    def __init__(self) -> None:
        self.frames = [SimpleNamespace(start_percent=0.2), SimpleNamespace(start_percent=0.6)]

    def patch(self, q: Any, options: dict[str, Any]) -> Any:
        return q if options["sigmas"][0] in self.frames else None


@pytest.mark.parametrize(
    ("patch", "levels"),
    [
        (closure(4.0, 0.7), {4.0, percent_to_sigma(0.7)}),
        (ImageTokens(None, torch.zeros(3), 0.8, 9.0, 0.5), {9.0, 0.5}),
        (with_arguments, {0.25, percent_to_sigma(0.25), 2.5}),
        (calls_another, {0.25, percent_to_sigma(0.25), 2.5}),
        (partial(with_arguments, start=1.5), {1.5, 0.25, percent_to_sigma(0.25), 2.5}),
        (Keyframes().patch, {percent_to_sigma(0.2), percent_to_sigma(0.6)}),
        (closure(torch.tensor(4.0), 1.0), {4.0, 0.0}),  # type: ignore[arg-type]
        (plain_numbers(1.5, 0.5), set()),
    ],
    ids=["closure", "attributes", "defaults", "called", "partial", "method", "tensor", "does not read"],
)
def test_levels_that_a_patch_holds(patch: Any, levels: set[float]) -> None:
    assert found(patch) == Gates(frozenset(levels), "", patched=True)


def test_what_cannot_be_read_is_said() -> None:
    large: Any = closure(4.0, 0.7)
    large.__closure__[0].cell_contents = [0.5] * MOST_OBJECTS
    for patch in (lambda q, k, v, options: (q * options["sigmas"][0], k, v), large):
        assert "changes with the noise level; where is not known" in found(patch).unknown
    assert found(plain_numbers(1.5, 0.5)).unknown == ""
    assert gates({}, {}, percent_to_sigma) == Gates()


def test_a_chain_of_controlnets_has_every_start_and_end() -> None:
    first, second = comfy.controlnet.ControlBase(), comfy.controlnet.ControlBase()
    first.timestep_percent_range, second.timestep_percent_range = (0.0, 0.4), (0.1, 1.0)
    second.set_previous_controlnet(first)
    made = gates({}, {"positive": [{"control": second}], "negative": [{}]}, percent_to_sigma)
    assert made.levels == {percent_to_sigma(percent) for percent in (0.0, 0.4, 0.1, 1.0)}
    assert not made.patched


def test_phases() -> None:
    made = Gates(frozenset({4.0, 0.5}))
    assert len({made.phase(sigma) for sigma in (9.0, 4.0, 2.0, 0.5, 0.1)}) == 5
    assert made.phase(3.9) == made.phase(0.6)
    assert made.phase(9.0) == made.phase(4.1)
