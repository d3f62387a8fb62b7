"""Stage 3: a U-Net of any layout at a tenth of SDXL's width, trained on ready latents and ready embeddings."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTokenizer

from koala.export import unet_config
from koala.layout import KOALA_TINY, Layout
from tools.tiny import autoencoder, checkpoints, text
from tools.tiny.pictures import KOALA, Drawings, all_captions, draw, random_captions, random_drawings

STAGE = 3
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Recipe:
    """First small pictures (four times as cheap, enough to learn what words mean), then full-size ones; the size ids
    tell the net which. variants: embeddings of each caption, the first clean, the others with random words around.
    koalas: how much oftener than other shapes the one with a face is seen. mean_weight: how much more the error's mean
    over the picture counts. At this width a norm group is one channel: each norm takes the mean away, which is the
    picture's colour, and a deep net is slow to find a way around."""

    small_size: int = 64
    small_steps: int = 1200
    small_drawings: int = 6000
    size: int = 128
    steps: int = 2800
    drawings: int = 3500
    koalas: float = 2.0
    batch: int = 32
    learning_rate: float = 1.2e-3
    variants: int = 4
    clean: float = 0.75
    drop: float = 0.10
    most_weight: float = 15.0
    mean_weight: float = 0.0
    ema: float = 0.999


TEACHER = Recipe(small_steps=1600, steps=5000, batch=16, learning_rate=8e-4, most_weight=60.0, mean_weight=30.0)
"""For sdxl-tiny, with three times the weights."""


def new_unet(layout: Layout = KOALA_TINY) -> UNet2DConditionModel:
    """A layout with random weights."""
    return UNet2DConditionModel.from_config(unet_config(layout, Recipe().size))


def new_scheduler() -> EulerDiscreteScheduler:
    """SDXL base's sampler settings, which are KOALA's too."""
    return EulerDiscreteScheduler(
        **NOISE, num_train_timesteps=1000, prediction_type="epsilon", timestep_spacing="leading", steps_offset=1
    )


@dataclass(frozen=True)
class Embeddings:
    """Every caption's context [c, v, 77, 96] and pooled [c, v, 64], v variants each; `index` finds a text's row."""

    context: torch.Tensor
    pooled: torch.Tensor
    index: dict[str, int]


def embed_captions(encoders: text.Encoders, tokenizer: CLIPTokenizer, recipe: Recipe, seed: int) -> Embeddings:
    """Encode every caption of every template, clean and with filler words."""
    texts = [c.text for c in all_captions()]
    tokens = text.tokenize(tokenizer, texts)
    generator = checkpoints.step_generator(seed, STAGE, 10**7)
    filler = text.Recipe().max_filler
    versions = [tokens] + [text.add_filler(tokens, filler, generator) for _ in range(recipe.variants - 1)]
    encoded = [text.encode(encoders, version) for version in versions]
    return Embeddings(
        context=torch.stack([c for c, _ in encoded], dim=1),
        pooled=torch.stack([p for _, p in encoded], dim=1),
        index={t: i for i, t in enumerate(texts)},
    )


@dataclass(frozen=True)
class Latents:
    """A data set: latents [n, 4, size/8, size/8] of drawings of `size` pixels."""

    latents: torch.Tensor
    size: int


def encode_drawings(model: AutoencoderKL, recipe: Recipe, size: int, seed: int, folder: Path) -> Latents:
    """The latents of the data set at this size, from the file if an earlier run left it."""
    path = folder / f"latents-{size}.pt"
    if not path.exists():
        drawings = _drawings(recipe, size, seed)
        parts = [drawings.pick(index) for index in torch.arange(len(drawings)).split(64)]
        checkpoints.save(torch.cat([autoencoder.encode(model, draw(part, size)) for part in parts]), path)
    return Latents(checkpoints.load(path), size)


def _drawings(recipe: Recipe, size: int, seed: int) -> Drawings:
    count = recipe.drawings if size == recipe.size else recipe.small_drawings
    return random_drawings(count, checkpoints.step_generator(seed, STAGE, 10**8 + size))


def train(
    recipe: Recipe,
    small: Latents,
    full: Latents | None,
    embeddings: Embeddings,
    seed: int,
    path: Path,
    log: Callable[[str], None],
    look: Callable[[UNet2DConditionModel, int], None],
    layout: Layout = KOALA_TINY,
) -> UNet2DConditionModel:
    """Train, or go on from the checkpoint at `path`; returns the averaged weights, exact in fp16. `look` is called
    every 1000 steps with the averaged net and the picture size. Without `full` all steps are on small pictures."""
    torch.manual_seed(seed)
    model, average = new_unet(layout), new_unet(layout).requires_grad_(False).eval()
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start = 0
    if path.exists():
        state = checkpoints.load(path)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    drawings = {data.size: _drawings(recipe, data.size, seed) for data in (small, full) if data}
    odds = {size: 1 + (recipe.koalas - 1) * (d.shape == KOALA).float() for size, d in drawings.items()}
    total = recipe.small_steps + recipe.steps
    running = None
    for step in range(start, total):
        generator = checkpoints.step_generator(seed, STAGE, step)
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = recipe.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / total))
        data = full if full and step >= recipe.small_steps else small
        chosen = torch.multinomial(odds[data.size], recipe.batch, replacement=True, generator=generator)
        captions = random_captions(drawings[data.size].pick(chosen), generator)
        context, pooled = _conditions(embeddings, [c.text for c in captions], recipe, generator)
        loss = noise_loss(model, data.size, data.latents[chosen], context, pooled, recipe, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = float(loss.detach()) if running is None else 0.98 * running + 0.02 * float(loss.detach())
        if (step + 1) % 100 == 0:
            log(f"unet {step + 1}/{total} size={data.size} loss={running:.4f}")
        if (step + 1) % 200 == 0 or step + 1 == total:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save({**state, "step": step + 1}, path)
        if (step + 1) % 1000 == 0 and step + 1 < total:
            look(average, data.size)
    return average.half().float()


def _conditions(
    embeddings: Embeddings, texts: list[str], recipe: Recipe, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled of each text; some dropped to zeros, which is what diffusers' pipeline gives an SDXL model
    for an empty negative prompt (the words "" themselves are a caption of their own)."""
    n = len(texts)
    row = torch.tensor([embeddings.index[t] for t in texts])
    variant = torch.randint(1, recipe.variants, (n,), generator=generator)
    variant = variant.where(torch.rand(n, generator=generator) >= recipe.clean, 0)
    keep = (torch.rand(n, generator=generator) >= recipe.drop).float()
    return embeddings.context[row, variant] * keep.view(n, 1, 1), embeddings.pooled[row, variant] * keep.view(n, 1)


def noise_loss(
    model: Callable[..., Any],
    size: int,
    latents: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    recipe: Recipe,
    generator: torch.Generator,
) -> torch.Tensor:
    """Error of the predicted noise, weighted by 1/alpha_bar (the loss of velocity prediction): colours are decided
    where noise is strongest, and there the plain error is tiny whatever the net says. `model`: a U-Net, or what is
    called like one; `size`: the pictures', in pixels; latents: [n, 4, size/8, size/8]; of the `recipe` only the two
    weights of the error count."""
    n = len(latents)
    signal = DDPMScheduler(**NOISE).alphas_cumprod
    noise = torch.randn(latents.shape, generator=generator)
    # One time step from each of n equal stretches: the same mean, less variance.
    time = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * len(signal)).long()
    alpha = signal[time].view(n, 1, 1, 1)
    sizes = torch.tensor([[size, size, 0, 0, size, size]]).float().expand(n, 6)
    predicted = model(
        alpha.sqrt() * latents + (1 - alpha).sqrt() * noise,
        time,
        context,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    ).sample
    weight = (1 / signal).clamp(max=recipe.most_weight)
    error = predicted - noise
    told = error.square().mean(dim=(1, 2, 3)) + recipe.mean_weight * error.mean(dim=(2, 3)).square().mean(dim=1)
    return (told * (weight / weight.mean())[time]).mean()
