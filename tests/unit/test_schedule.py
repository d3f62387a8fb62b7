"""Sigmas and the scaling of the first noise, equal to what diffusers' pipelines compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

from koala_sdxl.koala.releases import BASE, LIGHTNING, SCHEDULER_CONFIG, SPACINGS, Spacing
from koala_sdxl.koala.schedule import schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers, with NumPy 2

LEADING_25 = """11.6761 9.3381 7.5624 6.1970 5.1344 4.2975 3.6307 3.0930 2.6545 2.2929 1.9911 1.7365 1.5192 1.3318
                1.1682 1.0239 0.8952 0.7789 0.6726 0.5741 0.4810 0.3910 0.3006 0.2018 0.0413 0"""
TRAILING_10 = "14.6146 8.3028 5.0878 3.3211 2.2765 1.6129 1.1606 0.8299 0.5693 0.3417 0"


def reference(steps: int, spacing: Spacing) -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("spacing", SPACINGS)
def test_sigmas_and_first_noise_of_every_step_count(spacing: Spacing) -> None:
    for steps in range(1, 101):
        ours, theirs = schedule(steps, spacing), reference(steps, spacing)
        assert ours.sigmas.dtype == torch.float32
        assert torch.equal(ours.sigmas, theirs.sigmas), steps
        first = ours.sigmas[0]
        scale = (first**2 + 1) ** 0.5 if ours.full_variance else first
        assert float(scale) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6), steps


@pytest.mark.parametrize(
    ("steps", "spacing", "figures"),
    [
        (BASE.settings.steps, BASE.settings.spacing, LEADING_25),
        (LIGHTNING.settings.steps, LIGHTNING.settings.spacing, TRAILING_10),
    ],
)
def test_published_schedules(steps: int, spacing: Spacing, figures: str) -> None:
    expected = [float(figure) for figure in figures.split()]
    assert schedule(steps, spacing).sigmas.tolist() == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("steps", "spacing", "scale"),
    [(25, "leading", 11.718795), (10, "trailing", 14.614647), (25, "trailing", 14.614647), (25, "linspace", 14.614647)],
)
def test_first_noise(steps: int, spacing: Spacing, scale: float) -> None:
    made = schedule(steps, spacing)
    first = float(made.sigmas[0])
    assert ((first**2 + 1) ** 0.5 if made.full_variance else first) == pytest.approx(scale, abs=2e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_denoise_keeps_the_steps_that_image_to_image_keeps(spacing: Spacing) -> None:
    for steps in (3, 10, 25, 30, 61, 100):
        scheduler = reference(steps, spacing)
        for strength in (0.34, 0.58, 0.6, 0.7, 0.99, 1.0):
            pipeline = cast(StableDiffusionXLImg2ImgPipeline, SimpleNamespace(scheduler=scheduler))
            timesteps, count = StableDiffusionXLImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
            made = schedule(steps, spacing, strength)
            assert len(made.sigmas) == len(timesteps) + 1, (steps, strength)
            assert torch.equal(made.sigmas, scheduler.sigmas[steps - count :]), (steps, strength)


def test_added_noise_is_scaled_by_sigma_alone() -> None:
    """The image-to-image pipeline adds noise by ``add_noise``: by sigma, also where a whole schedule takes more."""
    scheduler = reference(25, "leading")
    made = schedule(25, "leading", 0.6)
    assert not made.full_variance
    start = scheduler.timesteps[-15:][:1]
    added = scheduler.add_noise(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), start)
    assert float(added) == float(made.sigmas[0])


def test_a_models_own_scheduler_settings_are_followed() -> None:
    other = schedule(25, "leading", config={**SCHEDULER_CONFIG, "steps_offset": 0})
    theirs = EulerDiscreteScheduler.from_config({**SCHEDULER_CONFIG, "steps_offset": 0})
    theirs.set_timesteps(25)
    assert torch.equal(other.sigmas, theirs.sigmas)
    assert not torch.equal(other.sigmas, schedule(25, "leading").sigmas)


def test_nothing_to_run_is_an_error_whose_advice_works() -> None:
    for steps in (1, 3, 7, 25, 30, 99):
        with pytest.raises(ValueError, match="leaves no step to run: raise denoise to at least") as caught:
            schedule(steps, "leading", 0.5 / steps)
        advised = float(str(caught.value).split("at least ")[1].split(",")[0])
        assert int(steps * advised) == 1, steps
