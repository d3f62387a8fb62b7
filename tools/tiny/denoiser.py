"""Stage 3: a U-Net of any layout at a tenth of SDXL's width, trained on precomputed latents and embeddings."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTokenizer

from koala_sdxl.koala.architecture.layout import KOALA_TINY, Layout
from koala_sdxl.koala.files.export import unet_config
from tools.tiny import autoencoder, checkpoints, text
from tools.tiny.device import DEVICE, replayed
from tools.tiny.pictures import KOALA, Drawings, all_captions, draw, random_captions, random_drawings

STAGE = 3
SAVE_EVERY = 120  # seconds
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Recipe:
    """First small images (a quarter of the cost, enough to learn the meaning of words), then full-size ones; the size
    ids distinguish them. variants: embeddings of each caption, the first clean, the others with random words around.
    koalas: frequency of the shape with a face, relative to other shapes. mean_weight: additional weight of the error's
    mean over the image in the first mean_steps. At this width a norm group is one channel: each norm removes the mean,
    which is the image's colour, and a deep network does not learn to compensate for that by itself. looks: how often
    its images are judged during training."""

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
    mean_steps: int = 0
    ema: float = 0.999
    looks: int = 4


TEACHER = Recipe(
    small_steps=2000,
    steps=9000,
    small_drawings=8000,
    drawings=8000,
    batch=64,
    learning_rate=1e-3,
    mean_weight=30.0,
    mean_steps=5000,
)
"""For sdxl-tiny, which has three times as many weights."""
GROWN = Recipe(
    small_steps=0, steps=700, batch=16, learning_rate=1e-3, mean_weight=3.0, mean_steps=700, ema=0.99, looks=2
)
"""For sdxl-tiny that begins with koala-tiny's weights: a quarter of an hour on one CPU core."""


def new_unet(layout: Layout = KOALA_TINY) -> UNet2DConditionModel:
    """A layout with random weights."""
    return UNet2DConditionModel.from_config(unet_config(layout, Recipe().size))


def new_scheduler() -> EulerDiscreteScheduler:
    """SDXL base's scheduler settings, which are also KOALA's."""
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
    """The latents of the data set at this size, from an earlier run's file if there is one."""
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
    small: Latents | None,
    full: Latents | None,
    embeddings: Embeddings,
    seed: int,
    path: Path,
    log: Callable[[str], None],
    look: Callable[[UNet2DConditionModel, int], None],
    layout: Layout = KOALA_TINY,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> UNet2DConditionModel:
    """Train, or resume from the checkpoint at `path`; returns the averaged weights on the CPU, exact in fp16. `look` is
    called `recipe.looks` times with the averaged network and the image size. Without `full` all steps use small
    images, without `small` all use full-size ones. `weights` to begin with; random ones if there are none."""
    torch.manual_seed(seed)
    model, average = new_unet(layout).to(DEVICE), new_unet(layout).to(DEVICE).requires_grad_(False).eval()
    if weights is not None:
        model.load_state_dict(weights)
    average.load_state_dict(model.state_dict())
    rate = torch.tensor(recipe.learning_rate, device=DEVICE)
    # not the checkpoint's, which may come from another machine
    here: dict[str, Any] = {"lr": rate, "capturable": DEVICE.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True, **here)
    start = 0
    if path.exists():
        state = checkpoints.load(path)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group.update(here)
        start = state["step"]
    drawings = {data.size: _drawings(recipe, data.size, seed) for data in (small, full) if data}
    odds = {size: 1 + (recipe.koalas - 1) * (d.shape == KOALA).float() for size, d in drawings.items()}
    total = recipe.small_steps + recipe.steps

    def learn(given: Sequence[torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        loss = noise_loss(model, Shown(*given))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    step_on, running, saved = replayed(learn), None, time.monotonic()
    for step in range(start, total):
        generator = checkpoints.step_generator(seed, STAGE, step)
        warm = min(1.0, (step + 1) / 100)
        rate.fill_(recipe.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / total)))
        data = full if full and step >= recipe.small_steps else small
        assert data is not None
        chosen = torch.multinomial(odds[data.size], recipe.batch, replacement=True, generator=generator)
        captions = random_captions(drawings[data.size].pick(chosen), generator)
        conditions = _conditions(embeddings, [c.text for c in captions], recipe, generator)
        mean_weight = recipe.mean_weight if step < recipe.mean_steps else 0.0
        loss = step_on(shown(data.size, data.latents[chosen], *conditions, generator, recipe.most_weight, mean_weight))
        decay = min(recipe.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss if running is None else running.lerp(loss, 0.02)
        if (step + 1) % 100 == 0:
            log(f"unet {step + 1}/{total} size={data.size} loss={float(running):.4f}")
        if time.monotonic() - saved > SAVE_EVERY or step + 1 == total:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save({**state, "step": step + 1}, path)
            saved = time.monotonic()
        if (step + 1) % (total // recipe.looks) == 0 and step + 1 < total:
            look(average, data.size)
    return average.cpu().half().float()


def _conditions(
    embeddings: Embeddings, texts: list[str], recipe: Recipe, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled of each text; some replaced by zeros, which diffusers' pipeline gives an SDXL model for an
    empty negative prompt (the text "" is a caption of its own)."""
    n = len(texts)
    row = torch.tensor([embeddings.index[t] for t in texts])
    variant = torch.randint(1, recipe.variants, (n,), generator=generator)
    variant = variant.where(torch.rand(n, generator=generator) >= recipe.clean, 0)
    keep = (torch.rand(n, generator=generator) >= recipe.drop).float()
    return embeddings.context[row, variant] * keep.view(n, 1, 1), embeddings.pooled[row, variant] * keep.view(n, 1)


class Shown(NamedTuple):
    """One step's examples: `noisy` and `noise` [n, 4, h, w], `time` [n], `weight` of each error [n], `mean_weight` of
    the error's mean over the image, a scalar, `context` [n, 77, 96], `pooled` [n, 64], `sizes` [n, 6]."""

    noisy: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor
    weight: torch.Tensor
    mean_weight: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    sizes: torch.Tensor

    def to(self, device: torch.device) -> "Shown":
        """The same on a device."""
        return Shown(*(tensor.to(device) for tensor in self))


def shown(
    size: int,
    latents: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    generator: torch.Generator,
    most_weight: float = Recipe.most_weight,
    mean_weight: float = 0.0,
) -> Shown:
    """Add noise to latents [n, 4, size/8, size/8] of images of `size` pixels. Errors are weighted by 1/alpha_bar, at
    most `most_weight` (the loss of velocity prediction): colours are decided where noise is strongest, and there the
    unweighted error is tiny for any output. The error's mean over the image has the additional weight `mean_weight`."""
    n = len(latents)
    signal = DDPMScheduler(**NOISE).alphas_cumprod
    noise = torch.randn(latents.shape, generator=generator)
    # One time step from each of n equal intervals: the same mean, less variance.
    time = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * len(signal)).long()
    alpha = signal[time].view(n, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    weight = (1 / signal).clamp(max=most_weight)
    sizes = torch.tensor([[size, size, 0, 0, size, size]]).float().expand(n, 6)
    weight = (weight / weight.mean())[time]
    return Shown(noisy, noise, time, weight, torch.tensor(mean_weight), context, pooled, sizes)


def noise_loss(model: Callable[..., Any], given: Shown) -> torch.Tensor:
    """Weighted error of the noise that `model` (a U-Net, or anything with its signature) predicts."""
    conditions = {"text_embeds": given.pooled, "time_ids": given.sizes}
    error = model(given.noisy, given.time, given.context, added_cond_kwargs=conditions).sample - given.noise
    errors = error.square().mean(dim=(1, 2, 3)) + given.mean_weight * error.mean(dim=(2, 3)).square().mean(dim=1)
    return (errors * given.weight).mean()
