"""The parts of KOALA LoRA from SDXL: where it begins, the network that is fitted, and the fit itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from diffusers import DDPMScheduler

from koala_sdxl.distill.carry.samples import Samples as CarrySamples
from koala_sdxl.distill.carry.samples import Texts
from koala_sdxl.distill.carry.settings import Settings
from koala_sdxl.distill.carry.student import Learner, Student
from koala_sdxl.host.learning.network import Network, weights
from koala_sdxl.host.learning.samples import encoded
from koala_sdxl.host.learning.weights import Weights, differences
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.keys import renaming, tensors
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.lora.adjustable import Adjustable, adjustable
from koala_sdxl.koala.lora.factors import factors
from koala_sdxl.koala.lora.fit import fit_changes
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from tests.parity.learning import LINE, PROMPTS, Given, change, models, require_fitted_as_sampled, samples
from tools.measure import reference, transfer
from tools.synthetic import adapters
from tools.tiny import SHIPPED
from tools.tiny.grow import SDXL_TINY

NAMES = renaming(KOALA_TINY, "diffusers", "comfy")


@pytest.fixture(scope="module")
def given(own_models: None, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return models(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize("kind", ["LoCon", "LoHa", "norms", "whole differences"])
def test_the_start_is_what_koala_lora_loader_adds(given: Given, kind: str) -> None:
    state = adapters.lora(SDXL_TINY, kind, "kohya, LDM blocks")
    stock, _ = comfy.sd.load_lora_for_models(given.sdxl, None, state, 0.5, 0.0)
    found = dict(differences(Weights(given.sdxl), Weights(stock), LINE))
    with transfer.on_disk(state) as path:
        koala = apply_lora(given.koala, given.clip, path, 0.5, 0.0, trained_on="SDXL").model
    before, after = transfer.baked(given.koala), transfer.baked(koala)
    assert len(found) > 100
    for name, weight in before.items():
        change = after[name].float() - weight.float()
        torch.testing.assert_close(found.get(own(name), torch.zeros(1)).expand_as(change), change, atol=2e-5, rtol=0)


def own(name: str) -> str:
    return renaming(KOALA_TINY, "comfy", "diffusers")[name]


def test_the_network_that_is_fitted_is_the_koala_that_is_sampled(given: Given) -> None:
    """With a patch on it; and prompts of two lengths together."""
    with transfer.on_disk(change()) as path:
        koala = apply_lora(given.koala, given.clip, path, 1.0, 0.0, trained_on="SDXL").model
    require_fitted_as_sampled(koala, given.clip)


@pytest.mark.parametrize("state", ["NORMAL_VRAM", "LOW_VRAM", "NO_VRAM"])
def test_the_network_that_is_fitted_is_on_the_models_device(
    given: Given, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every flag for little VRAM; "meta" is the GPU here."""
    management = comfy.model_management
    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **both: (1e12, 1e12) if both else 1e12)
    koala = given.koala.clone()
    koala.load_device = torch.device("meta")
    with torch.inference_mode(False):
        assert {weight.device for weight in Network(koala).unet.parameters()} == {koala.load_device}


def test_the_fit_is_that_of_dev_py_carry(given: Given) -> None:
    """Same KOALA, samples and wanted change: ComfyUI's network and diffusers' give the same LoRA."""
    texts = encoded(given.clip, PROMPTS[2:])
    start = factors(differences(Weights(given.sdxl), Weights(given.sdxl_changed), LINE), 4)
    model_sampling = given.koala.get_model_object("model_sampling")
    with torch.inference_mode(False):
        seen = samples(texts)
        time = model_sampling.timestep(seen.sigma).long()
        seen = seen._replace(sigma=model_sampling.sigma(time).clone())
        asked = 0.3 * torch.randn(seen.noisy.shape, generator=torch.Generator().manual_seed(2))
        network = Network(given.koala)
        conditions = network.conditions(texts, seen)
        ours = fitted(adjustable(network.unet, start, NAMES), lambda: network.output(seen, conditions), start, asked)

        unet = reference.pipeline(SHIPPED).unet.float()
        context = torch.cat([text[0][0] for text in texts]).clone()
        pooled = torch.cat([text[0][1]["pooled_output"] for text in texts]).clone()
        places = Path()
        settings = Settings(places, places, places, places, places, size=64)
        noise = DDPMScheduler.from_config(dict(SCHEDULER_CONFIG))
        learner = Learner(start, adjustable(unet, start))
        student = Student(unet, learner, Texts((context, pooled), (context, pooled)), noise, settings)
        scaled = model_sampling.calculate_input(seen.sigma, seen.noisy).clone()
        carried = CarrySamples(scaled, time, seen.text, torch.zeros(4, dtype=torch.bool), torch.zeros(4).long())
        scale = float((student.weights[time] / weights(seen.sigma).flatten()).mean())
        theirs = fitted(learner.places, lambda: student._weighted(carried) / scale, start, asked)
    for name, number in ours.items():
        moved = float((theirs[name] - start[name]).norm())
        assert float((number - theirs[name]).norm()) < 0.01 * moved + 1e-6, name


def fitted(places: Adjustable, output: Callable[[], torch.Tensor], start: Any, change: torch.Tensor) -> Any:
    """The numbers after one round; ``change``: what is asked for beyond the output at the start."""
    every = (torch.arange(len(change)),)

    def outputs(at: Any) -> torch.Tensor:
        return places.outputs(dict(at), lambda _: output(), every)

    def slopes(at: Any, error: torch.Tensor) -> Any:
        return places.slopes(at, lambda _: output(), lambda _, part: error[part], every)

    wanted = outputs(start) + change
    return fit_changes(outputs, start, wanted, 2, slopes).changes


def test_a_fine_tune_is_a_change_like_any_other(given: Given) -> None:
    """Of norms and biases, too; what is equal is left out, and layers that KOALA lacks."""
    tuned, kept = given.sdxl.clone(), [whole for _, whole in LINE.tensors]
    chosen = [*kept[:6], *kept[-6:]]
    lacking = next(tensor for tensor in tensors(SDXL_TINY) if tensor not in kept)
    other = {f"diffusion_model.{one.comfy}": (0.01 * torch.ones(one.shape),) for one in (*chosen, lacking)}
    tuned.add_patches(other)
    own = {part.diffusers: part.shape for part, whole in LINE.tensors if whole in chosen}
    found = {name: tuple(change.shape) for name, change in differences(Weights(given.sdxl), Weights(tuned), LINE)}
    assert found == own
    assert {len(shape) for shape in found.values()} >= {1, 4}
