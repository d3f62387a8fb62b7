#!/usr/bin/env bash
# diffusers 0.42.1: with timestep_spacing="trailing" a few step counts get one more step than asked for, at timestep -1.
# DDIMScheduler and DDPMScheduler take that for the last, noisiest entry of their table and ruin a finished picture.
#
# Guess before running: set_timesteps(n) gives n timesteps between 999 and 0, and a scheduler that is fed a perfect
#   prediction of the noise returns the clean latent, whatever n is.
# Found: of 1 to 300 steps, 12 counts (61, 103, 121, 122, 201 ...) give n + 1 timesteps; the additional one is -1.
#   With a perfect prediction, root mean square error of the final latent:
#     steps   60       61       62
#     DDIM    0.03     14.0     0.00
#     DDPM    0.00     14.0     0.00
#     Euler   0.00     0.00     0.00    (only one network pass more than paid for)
# Why: timesteps are rounded from numpy.arange(1000, 0, -1000 / n). For these counts floating point leaves one value a
#   hair above 0, which becomes 0 - 1. DDIM and DDPM use it as an index: alphas_cumprod[-1]. Euler interpolates over the
#   table and clamps.
# What to do: drop timesteps below 0 after set_timesteps, or take a neighbouring number of steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "diffusers==0.42.1" "numpy==2.4.6" 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
cat >"$folder/check.py" <<'PYTHON'
import diffusers
import numpy
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, numpy {numpy.__version__}")


def scheduler(kind, steps):
    extra = {} if kind is EulerDiscreteScheduler else {"clip_sample": False}
    made = kind(**CONFIG, **extra)
    made.set_timesteps(steps)
    return made


def error(kind, steps):
    """Root mean square error of the final latent where the noise is predicted perfectly at every step."""
    made = scheduler(kind, steps)
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    if kind is EulerDiscreteScheduler:
        latent = noise * made.init_noise_sigma
    else:
        latent = made.add_noise(clean, noise, made.timesteps[:1])
    for step in made.timesteps:
        seen = made.scale_model_input(latent, step)
        alpha = made.alphas_cumprod[max(int(step), 0)]
        predicted = (seen - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        latent = made.step(predicted, step, latent).prev_sample
    return float((latent - clean).square().mean().sqrt())


longer = [steps for steps in range(1, 301) if len(scheduler(EulerDiscreteScheduler, steps).timesteps) != steps]
print("step counts up to 300 with a timestep too many:", longer)
for kind in (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler):
    last = [int(value) for value in scheduler(kind, 61).timesteps[-2:]]
    errors = {steps: round(error(kind, steps), 2) for steps in (60, 61, 62)}
    print(f"{kind.__name__}: 61 steps end in {last}; error by steps {errors}")
    assert last == [15, -1]
    assert (errors[61] > 10) == (kind is not EulerDiscreteScheduler)
    assert max(errors[60], errors[62]) < 0.1
assert longer[:5] == [61, 103, 121, 122, 201] and len(longer) == 12
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py"
