"""Published settings -> sigmas, through diffusers' own scheduler class rather than a copy of its mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

import torch

from .releases import SCHEDULER_CONFIG, Spacing
from .requirements import scheduler_class


class Schedule(NamedTuple):
    """A noise schedule.

    ``sigmas``: (steps + 1,) float32, descending, ends in 0, or above it where the model's configuration has
    ``final_sigmas_type`` sigma_min; one more where diffusers' rounding gives a trailing schedule a step more than asked
    for (61 steps, 103, and a few others). ``full_variance``: how unit noise is scaled before it becomes (or is added
    to) the first latent: by sqrt(sigma^2 + 1) if true, else by sigma, sigma being the first.
    """

    sigmas: torch.Tensor
    full_variance: bool


def schedule(
    steps: int, spacing: Spacing, denoise: float = 1.0, config: Mapping[str, object] = SCHEDULER_CONFIG
) -> Schedule:
    """Sigmas of diffusers' ``EulerDiscreteScheduler`` for any number of steps, and how it scales the first noise.

    Args:
        steps: of a full schedule.
        spacing: which timesteps it takes.
        denoise: below 1 it keeps the last ``int(steps * denoise)`` steps, as the image-to-image pipeline's
            ``strength`` does, and noise is then scaled by the first sigma (``add_noise``). A full schedule scales it by
            ``init_noise_sigma``: sqrt(sigma^2 + 1) for leading, sigma for trailing and linspace.
        config: the model's scheduler_config.json, as ``files.config.complete_scheduler`` checked it.

    Raises:
        ValueError: ``denoise`` leaves no step.
        RequirementError: diffusers is missing, too old or broken.
    """
    # diffusers takes a second to import; nothing before the first schedule needs it
    scheduler = scheduler_class().from_config(dict(config), timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    remaining = min(int(steps * denoise), steps)
    if remaining < 1:
        least = ceil(100 / steps) / 100  # the nodes' inputs have two decimals
        raise ValueError(
            f"denoise {denoise:g} of {steps} steps leaves no step to run: raise denoise to at least {least:g}, "
            f"or take more steps."
        )
    sigmas = scheduler.sigmas[steps - remaining :].float().cpu()
    is_full = remaining == steps
    return Schedule(sigmas, is_full and bool(scheduler.init_noise_sigma > sigmas[0]))
