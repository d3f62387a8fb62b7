"""Stage 1: the autoencoder, image [n, 3, S, S] in [-1, 1] <-> latent [n, 4, S/8, S/8]."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from koala_sdxl.koala.architecture.components import LATENT_SCALE
from tools.tiny import checkpoints
from tools.tiny.pictures import KOALA, draw, random_drawings

LATENT_NOISE = 0.05  # of the latents' standard deviation: added in training, so that no detail hides in huge values
STAGE = 1


@dataclass(frozen=True)
class Recipe:
    """crop_steps on 64 px crops (cheap), then whole_steps on whole images (what the U-Net will see)."""

    crop_steps: int = 900
    whole_steps: int = 100
    crop_batch: int = 8
    whole_batch: int = 4
    size: int = 128
    crop: int = 64
    learning_rate: float = 1.5e-3


def new_autoencoder() -> AutoencoderKL:
    """An autoencoder with SDXL's architecture whose two output norms preserve flat colours (see `_pass_levels`)."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=128,
        scaling_factor=LATENT_SCALE,
    )
    _start_as_thumbnail(model)
    encoder, decoder = model.encoder, model.decoder
    middle, attention = encoder.mid_block.resnets, encoder.mid_block.attentions[0].to_out[0]
    into = [encoder.down_blocks[2].downsamplers[0].conv, encoder.down_blocks[3].resnets[0].conv2, middle[0].conv2]
    _pass_levels([*into, attention], middle[1], frame=4.0)
    last = decoder.up_blocks[3].resnets
    _pass_levels([decoder.up_blocks[2].upsamplers[0].conv, last[0].conv2], last[1], frame=12.0)
    return model


@torch.no_grad()
def _start_as_thumbnail(model: AutoencoderKL) -> None:
    """Initialise as the simplest working autoencoder, in place: three latent channels are the image's red, green and
    blue at 1/8 size, passed through the residual stream in both directions. From random weights it takes the first
    thousand steps to learn this."""
    wires = {0: 0, 1: 2, 2: 4}  # colour -> channel of the stream; _pass_levels makes 1, 3, 5 their negatives
    carried = range(6)
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight[carried], module.conv2.bias[carried] = 0.0, 0.0
        if isinstance(module, Attention):
            module.to_out[0].weight[carried], module.to_out[0].bias[carried] = 0.0, 0.0
    halve = [block.downsamplers[0].conv for block in model.encoder.down_blocks[:-1]]
    double = [block.upsamplers[0].conv for block in model.decoder.up_blocks[:-1]]
    for layer in [model.encoder.conv_in, model.decoder.conv_in, *halve, *double]:
        layer.weight[carried], layer.bias[carried] = 0.0, 0.0
    for layer in (model.encoder.conv_out, model.decoder.conv_out):
        layer.weight[list(wires)], layer.bias[list(wires)] = 0.0, 0.0
    for layer in (model.quant_conv, model.post_quant_conv):
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for colour, wire in wires.items():
        for layer in (model.encoder.conv_in, model.decoder.conv_in):
            layer.weight[wire, colour, 1, 1] = 1.0
        for layer in halve:
            layer.weight[wire, wire, :2, :2] = 0.25
        for layer in double:
            layer.weight[wire, wire, 1, 1] = 1.0
        for layer in (model.encoder.conv_out, model.decoder.conv_out):
            # silu(u) - silu(-u) = u; the norm divides by about 2 (see the frames).
            layer.weight[colour, wire, 1, 1], layer.weight[colour, wire + 1, 1, 1] = 2.0, -2.0


@torch.no_grad()
def _pass_levels(before: list[nn.Conv2d | nn.Linear], last: ResnetBlock2D, frame: float) -> None:
    """Initialise so that a GroupNorm with two channels per group preserves absolute levels, in place.

    GroupNorm removes only a group's own mean and standard deviation. Therefore the second channel of each pair is minus
    the first plus a fixed frame (made from the zero padding at the image's border): the pair's mean is then constant
    and its standard deviation hardly depends on the image. Without this, training finds a worse way to fix the
    statistics: a spike inside the image, visible as a bright spot.

    `before`: the layers that write the channels which the norm reads; `last`: the residual block right before it."""
    for layer in [*before, last.conv2]:
        layer.weight[1::2] = -layer.weight[0::2]
        layer.bias[1::2] = -layer.bias[0::2]
    # One constant input channel; its 3x3 sum is 9 inside and 6 at an edge, and the bias makes the inside zero.
    last.norm2.weight[0], last.norm2.bias[0] = 0.0, 1.0
    constant = float(functional.silu(last.norm2.bias[0]))
    last.conv2.weight[1::2, 0] = frame / (3 * constant)
    last.conv2.bias[1::2] -= 3 * frame


def train(recipe: Recipe, seed: int, path: Path, log: Callable[[str], None]) -> AutoencoderKL:
    """Train, or resume from the checkpoint at `path`; returns the standardised autoencoder in eval mode."""
    torch.manual_seed(seed)
    model = new_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    start = 0
    if path.exists():
        state = checkpoints.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    total = recipe.crop_steps + recipe.whole_steps
    for step in range(start, total):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 50)
            group["lr"] = recipe.learning_rate * warm * max(0.01, 0.5 + 0.5 * math.cos(math.pi * step / total))
        whole = step >= recipe.crop_steps
        pictures = _batch(recipe, whole, checkpoints.step_generator(seed, STAGE, step))
        loss, error = _loss(model, pictures, checkpoints.step_generator(seed, STAGE + 10, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            kind = "whole" if whole else "crops"
            log(f"autoencoder {step + 1}/{total} {kind} {decibels(error):.1f} dB loss={float(loss.detach()):.4f}")
        if (step + 1) % 100 == 0 or step + 1 == total:
            checkpoints.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path)
    model.eval()
    return standardise(model, seed, recipe.size)


def _batch(recipe: Recipe, whole: bool, generator: torch.Generator) -> torch.Tensor:
    n = recipe.whole_batch if whole else recipe.crop_batch
    drawings = random_drawings(n, generator)
    drawings.shape[: n // 4] = KOALA  # small features take more examples to learn than edges
    pictures = draw(drawings, recipe.size)
    if whole:
        return pictures
    # A random window; one of half the width always contains a part of the shape.
    room = recipe.size - recipe.crop
    corners = torch.randint(room + 1, (n, 2), generator=generator).tolist()
    return torch.stack(
        [p[:, t : t + recipe.crop, s : s + recipe.crop] for p, (t, s) in zip(pictures, corners, strict=True)]
    )


def _loss(model: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    latents = model.encode(pictures).latent_dist.mode()
    noise = torch.randn(latents.shape, generator=generator) * LATENT_NOISE
    # Like the KL term for a fixed posterior variance; the fourth power is against spikes.
    prior = 1e-3 * latents.pow(2).mean() + 1e-4 * latents.pow(4).mean()
    rebuilt = model.decode(latents + noise).sample
    square = functional.mse_loss(rebuilt, pictures)
    return functional.l1_loss(rebuilt, pictures) + 2 * square + prior, float(square.detach())


def decibels(mean_square_error: float) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1], in decibels."""
    return 10 * math.log10(4 / max(mean_square_error, 1e-12))


@torch.no_grad()
def standardise(model: AutoencoderKL, seed: int, size: int) -> AutoencoderKL:
    """Fold each latent channel's mean and spread into the two 1x1 convolutions beside the latents, in place, so that
    `latents * LATENT_SCALE` has mean 0 and standard deviation 1; the posterior's variance becomes that of the noise
    with which the decoder was trained."""
    pictures = draw(random_drawings(128, checkpoints.step_generator(seed, STAGE, 10**7)), size)
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in pictures.split(16)])
    mean = latents.mean(dim=(0, 2, 3))
    spread = latents.std(dim=(0, 2, 3)) * LATENT_SCALE
    channels = len(mean)
    encode, decode = model.quant_conv, model.post_quant_conv
    encode.weight[:channels] /= spread.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - mean) / spread
    encode.weight[channels:] = 0
    encode.bias[channels:] = 2 * torch.log(LATENT_NOISE / spread)
    decode.bias += (decode.weight[:, :, 0, 0] * mean).sum(1)
    decode.weight *= spread.view(1, -1, 1, 1)
    return model


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Standardised latents, float32 [n, 4, S/8, S/8], of images [n, 3, S, S]."""
    parts = [model.encode(part.to(model.device)).latent_dist.mode().cpu() for part in pictures.split(16)]
    return torch.cat(parts) * LATENT_SCALE
