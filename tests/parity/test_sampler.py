"""KOALA Sampler does what core's samplers do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_minimax_h3 import MiniMaxH3SigmaShift
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3

import nodes as core
from koala_sdxl.host.model import ATTACHMENT, model_facts
from koala_sdxl.koala import releases as settings
from koala_sdxl.koala.architecture.components import LATENT_SCALE
from koala_sdxl.koala.schedule import schedule
from koala_sdxl.nodes import prompt, sample
from tools.measure import parity

SETTINGS = {"preset": "custom", "steps": 4, "cfg": 7.5, "spacing": "leading"}


def _text(positive: str = "a red circle on a white background", negative: str = "", mode: str = "reference") -> Any:
    return prompt.KoalaPrompt.execute(parity.tiny_models()[1], positive, negative, "no style", mode)


def _run(latent: dict[str, Any], **changes: Any) -> torch.Tensor:
    positive, negative = _text().result
    arguments: dict[str, Any] = {"seed": 1, "preset": SETTINGS, "sampler_name": "euler", "denoise": 1.0} | changes
    model = arguments.pop("model", parity.tiny_models()[0])
    return sample.KoalaSampler.execute(model, positive, negative, latent, **arguments).result[0]["samples"]


def _empty(batch: int = 1, height: int = 16, width: int = 16) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 4, height, width)}


def _some(seed: int = 3) -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) / LATENT_SCALE


@pytest.mark.parametrize("sampler_name", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_of_core_runs(sampler_name: str) -> None:
    assert torch.isfinite(_run(_empty(), sampler_name=sampler_name)).all()


@pytest.mark.parametrize(
    "node",
    [
        lambda model: ModelSamplingSD3().patch(model, 3.0)[0],
        lambda model: MiniMaxH3SigmaShift.execute(model, 12.0, 3.0).result[0],
    ],
)
def test_flow_matching_is_refused(node: Any) -> None:
    """SDXL's noise levels, up to 14.6, spoil the image there, where 1 is pure noise."""
    model = node(parity.tiny_models()[0])
    with pytest.raises(ValueError, match=r"flow-matching.*Remove the node"):
        _run(_empty(), model=model)
    with pytest.raises(ValueError, match=r"flow-matching.*Remove the node"):
        sample.KoalaScheduler.execute(model, 10, "auto", 1.0)


@pytest.mark.parametrize("sampling", ["eps", "v_prediction", "lcm", "x0"])
def test_other_samplings_are_not(sampling: str) -> None:
    assert torch.isfinite(
        _run(_empty(), model=ModelSamplingDiscrete().patch(parity.tiny_models()[0], sampling, True)[0])
    ).all()


def test_same_sigmas_and_noise_give_what_core_gives() -> None:
    """At denoise below 1 both scale the noise by sigma, so nothing may differ."""
    model = parity.tiny_models()[0]
    positive, negative = _text().result
    sigmas = schedule(20, "leading", 0.5).sigmas
    noise = comfy.sample.prepare_noise(_some(), 9)
    sampler = comfy.samplers.sampler_object("dpmpp_2m")
    theirs = comfy.sample.sample_custom(model, noise, 5.0, sampler, sigmas, positive, negative, _some(), seed=9)
    chosen = {"preset": "custom", "steps": 20, "cfg": 5.0, "spacing": "leading"}
    ours = _run({"samples": _some()}, seed=9, preset=chosen, sampler_name="dpmpp_2m", denoise=0.5)
    assert torch.equal(ours, theirs)


def test_stock_ksampler_with_ddim_uniform_comes_close() -> None:
    """It takes the same sigmas when the steps divide 1000, and scales the first noise by 0.36 % less."""
    model = parity.tiny_models()[0]
    positive, negative = _text().result
    (latent,) = core.KSampler().sample(model, 1, 25, 7.5, "euler", "ddim_uniform", positive, negative, _empty())
    theirs = latent["samples"]
    ours = _run(_empty(), preset=SETTINGS | {"steps": 25})
    assert 0 < (ours - theirs).abs().mean() < 0.05 * ours.std()


def test_batch_members_differ_and_repeat() -> None:
    first, second = _run(_empty(batch=2)), _run(_empty(batch=2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_a_noise_mask_keeps_what_it_covers() -> None:
    start = _some()
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    made = _run({"samples": start, "noise_mask": mask})
    assert torch.allclose(made[..., 8:], start[..., 8:], atol=1e-4)
    assert not torch.allclose(made[..., :8], start[..., :8], atol=0.1)


def test_lower_denoise_keeps_more_of_the_start() -> None:
    start = _some()
    distances = [float((_run({"samples": start}, denoise=amount) - start).abs().mean()) for amount in (0.25, 0.75)]
    assert distances[0] < distances[1]


def test_denoise_that_leaves_no_step_says_so() -> None:
    with pytest.raises(ValueError, match=r"denoise 0\.01 of 4 steps leaves no step .* at least 0\.25"):
        _run(_empty(), denoise=0.01)


def test_auto_follows_the_variant_that_travels_with_the_model() -> None:
    model = parity.tiny_models()[0].clone()
    facts = model_facts(model)
    assert sample.settings_of(model, {"preset": "auto"})[0] == settings.BASE.settings
    identity = settings.Identity(settings.LIGHTNING, "a test")
    model.set_attachments(ATTACHMENT, facts.__class__(**{**vars(facts), "identity": identity}))
    chosen, why = sample.settings_of(model.clone(), {"preset": "auto"})
    assert chosen == settings.LIGHTNING.settings
    assert "a test" in why


def test_presets_are_the_published_settings() -> None:
    assert [str(found) for found in sample.PRESETS.values()] == [
        "25 steps, cfg 7.5, leading",
        "10 steps, cfg 3.5, trailing",
    ]


def test_the_sampler_leaves_the_model_untouched() -> None:
    model = parity.tiny_models()[0]
    before = (dict(model.object_patches), dict(model.model_options), model.patches_uuid)
    _run(_empty())
    assert before == (dict(model.object_patches), dict(model.model_options), model.patches_uuid)


def test_a_model_that_is_no_koala_is_refused_by_auto() -> None:
    other: Any = SimpleNamespace(model=torch.nn.Module(), get_attachment=lambda _: None)
    with pytest.raises(ValueError, match=r"this MODEL is not a KOALA model \(Module\)"):
        sample.settings_of(other, {"preset": "auto"})
