"""The U-Net's own timesteps follow every scheduler configuration that is taken, and none that is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from koala_sdxl.host.model import ATTACHMENT, model_facts
from koala_sdxl.koala.files.config import complete_scheduler
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.releases import SCHEDULER_CONFIG, Spacing
from koala_sdxl.koala.schedule import schedule
from koala_sdxl.nodes.sample import KoalaSampler
from tools.measure import parity

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers, with NumPy 2

TAKEN: list[dict[str, Any]] = [
    {},
    {"steps_offset": 0},
    {"final_sigmas_type": "sigma_min"},
    {"timestep_type": "continuous"},
    {"sigma_min": 0.01, "sigma_max": 20},
    {"timestep_spacing": "trailing"},
]
NOT_FOLLOWED: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_start": 0.0001},
    {"beta_end": 0.02},
    {"num_train_timesteps": 500},
    {"trained_betas": [0.001] * 1000},
    {"rescale_betas_zero_snr": True},
    {"interpolation_type": "log_linear"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"steps_offset": 100},
]


def _timesteps(stated: dict[str, Any], spacing: Spacing, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the host's U-Net for our sigmas, and of diffusers, (steps,) each."""
    config = {**SCHEDULER_CONFIG, **stated}
    theirs = EulerDiscreteScheduler.from_config(config, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    sigmas = schedule(steps, spacing, config=config).sigmas
    assert torch.equal(sigmas, theirs.sigmas)
    return parity.tiny_models()[0].model.model_sampling.timestep(sigmas[: len(theirs.timesteps)]), theirs.timesteps


@pytest.mark.parametrize("stated", TAKEN, ids=str)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_unet_gets_diffusers_timesteps(stated: dict[str, Any], spacing: Spacing) -> None:
    complete_scheduler(stated, "it", "")
    for steps in range(1, 101):
        ours, theirs = _timesteps(stated, spacing, steps)
        # 61 trailing steps are 62 by diffusers' rounding, and the last is before the first of the noise schedule
        assert torch.equal(ours.float(), theirs.clamp(min=0)), steps


@pytest.mark.parametrize("stated", NOT_FOLLOWED, ids=lambda stated: str(stated)[:40])
def test_what_is_refused_could_not_be_followed(stated: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(stated))):
        complete_scheduler(stated, "it", "")
    ours, theirs = _timesteps(stated, "leading", 12)
    assert not torch.equal(ours.float(), theirs)


def test_a_schedule_that_ends_above_zero_gives_diffusers_latent() -> None:
    config = {**SCHEDULER_CONFIG, "final_sigmas_type": "sigma_min"}
    model, clip, _ = parity.tiny_models()
    own = model.clone()
    own.set_attachments(ATTACHMENT, replace(model_facts(model), scheduler=config))
    positive, negative = parity.KoalaPrompt.execute(
        clip, parity.PROMPT, parity.NEGATIVE, "no style", "reference"
    ).result
    preset = {"preset": "custom", "steps": 8, "cfg": 7.5, "spacing": "leading"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    made, usual = (
        KoalaSampler.execute(loaded, positive, negative, latent, 3, preset, "euler", 1.0).result[0]["samples"]
        for loaded in (own, model)
    )
    pipeline = parity.tiny_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(config)
    wanted = pipeline(
        parity.PROMPT,
        negative_prompt=parity.NEGATIVE,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=8,
        guidance_scale=7.5,
        height=128,
        width=128,
        output_type="latent",
    ).images
    assert (made * parity.LATENT_SCALE - wanted).abs().max() <= parity.LATENT_BOUND
    assert (usual * parity.LATENT_SCALE - wanted).abs().max() > 10 * parity.LATENT_BOUND
