"""How good a small U-Net is: images of prompts, judged from their pixels, and the error on held-out drawings.

The share of correct images is what a person sees; the error distinguishes U-Nets whose images are all wrong or all
right.
"""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tools.tiny import autoencoder, checkpoints, denoiser, evaluate, pipeline, text
from tools.tiny.device import DEVICE
from tools.tiny.pictures import draw, random_captions, random_drawings

from .. import sheet

SIZE = 128  # pixels
PROMPTS = 108
SHOWN = 12  # images that are kept for viewing
HELD_OUT = 256  # drawings not used in training
BATCH = 32
STAGE = 9  # of tools.tiny's random numbers

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Latents [n, 4, 16, 16], context [n, 77, 96] and pooled [n, 64] of some drawings with their captions."""


def judge(
    unet: UNet2DConditionModel, teacher: Path, pictures: Path, prompts: int = PROMPTS, held_out: int = HELD_OUT
) -> dict[str, Any]:
    """tools.tiny's score at KOALA's published settings, and ``held_out``; the first images go to a PNG file.

    Args:
        unet: the U-Net to judge.
        teacher: the diffusers folder with the VAE and the text encoders.
        pictures: the PNG file.
        prompts: number of prompts.
        held_out: number of held-out drawings.
    """
    model = _model(teacher)
    model.unet = unet.to(DEVICE)
    texts, asked = evaluate.grid_prompts(prompts)
    made = pipeline.pictures(model, texts, seed=evaluate.SEED, size=SIZE)
    sheet.save(made[:SHOWN], SHOWN, pictures)
    return {**asdict(evaluate.score(made, asked)), "held_out": held_out_error(unet, teacher, held_out)}


@torch.no_grad()
def held_out_error(unet: UNet2DConditionModel, teacher: Path, count: int) -> float:
    """The velocity-weighted error of the predicted noise on ``count`` drawings from a seed of their own, with the same
    noise and time steps for every U-Net."""
    generator = checkpoints.step_generator(evaluate.SEED, STAGE, 1)
    errors = []
    for latents, context, pooled in zip(*(part.split(BATCH) for part in _held_out(teacher, count)), strict=True):
        given = denoiser.shown(SIZE, latents, context, pooled, generator)
        errors.append(denoiser.noise_loss(unet, given.to(unet.device)))
    return float(torch.stack(errors).mean())


@cache
def _model(teacher: Path) -> pipeline.StableDiffusionXLPipeline:
    return pipeline.load(teacher).to(DEVICE)


@cache
def _held_out(teacher: Path, count: int) -> Sample:
    model = _model(teacher)
    generator = checkpoints.step_generator(evaluate.SEED, STAGE, 0)
    drawings = random_drawings(count, generator)
    said = [caption.text for caption in random_captions(drawings, generator)]
    encoders = text.Encoders(model.text_encoder, model.text_encoder_2)
    context, pooled = text.encode(encoders, text.tokenize(model.tokenizer, said))
    return autoencoder.encode(model.vae, draw(drawings, SIZE)), context, pooled
