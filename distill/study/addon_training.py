"""A ControlNet for sdxl-tiny, trained and saved like those for SDXL; and what every add-on's training shares.

At 128 px, or at 64 for a teacher and a student that work well at that size.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline
from torch.nn import Parameter

from tools.synthetic import adapters
from tools.tiny import autoencoder, checkpoints, denoiser, text
from tools.tiny.pictures import Caption, caption, draw, random_captions, random_drawings

from ...koala.files.atomic_write import write_safetensors, written_whole
from .addon_pictures import outlines

SEED = 0
CONTROLNET_STAGE = 5  # of tools.tiny's random numbers
CONTROLNET_LAYOUT = adapters.shallow(adapters.SMALL_SDXL)
SHAPELESS = "a {background} background"

Log = Callable[[str], None]
Loss = Callable[[torch.Generator], torch.Tensor]
"""The loss of one step; the generator draws the examples."""
Residuals = Callable[..., dict[str, Any]]
"""What an outline, and what the U-Net sees, add to a U-Net's layers: further arguments of its forward pass."""


@dataclass(frozen=True)
class Recipe:
    """How an add-on is trained: on `drawings` drawings of `size` pixels; `drop` is the share of captions replaced by
    zeros, `rank` that of a LoRA."""

    steps: int
    learning_rate: float
    batch: int = 16
    size: int = 128
    drawings: int = 1000
    drop: float = 0.10
    warm: int = 20
    rank: int = 4


CONTROLNET = Recipe(steps=500, learning_rate=2e-3)


def at_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe for images of another size: the smaller they are, the larger the batch."""
    return replace(recipe, size=size, batch=recipe.batch * recipe.size // size)


def train_controlnet(
    teacher: StableDiffusionXLPipeline, path: Path, log: Log, recipe: Recipe = CONTROLNET, seed: int = SEED
) -> None:
    """Train the ControlNet that follows outlines and write it to `path`."""
    control = new_controlnet(teacher, seed)
    loss = outline_loss(teacher, by_controlnet(control), recipe, seed)
    minimise(loss, control.parameters(), recipe, CONTROLNET_STAGE, seed, lambda line: log(f"ControlNet {line}"))
    save_controlnet(control, path)


def new_controlnet(teacher: StableDiffusionXLPipeline, seed: int) -> ControlNetModel:
    """An untrained ControlNet that changes nothing, like SDXL's published medium ones: the teacher's down and middle
    blocks with few transformer blocks."""
    torch.manual_seed(seed)
    unet, weights = denoiser.new_unet(CONTROLNET_LAYOUT), teacher.unet.state_dict()
    unet.load_state_dict({name: weights[name] for name in unet.state_dict()})
    control = ControlNetModel.from_unet(unet)
    open_hint(control)
    return control.to(teacher.unet.device)


def open_hint(control: ControlNetModel) -> None:
    """Initialise the hint's convolutions, in place, so that its magnitude is preserved. With diffusers' initialisation
    the eight convolutions shrink it to almost nothing and the last is zero, so that hundreds of steps pass without a
    hint; the zero convolutions behind the ControlNet are enough for a start that changes nothing."""
    for module in control.controlnet_cond_embedding.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)


def by_controlnet(control: ControlNetModel) -> Residuals:
    """A ControlNet's residuals."""

    def residuals(hints: torch.Tensor, *given: torch.Tensor, **further: Any) -> dict[str, Any]:
        down, middle = control(*given, hints, return_dict=False, **further)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    return residuals


def outline_loss(teacher: StableDiffusionXLPipeline, residuals: Residuals, recipe: Recipe, seed: int) -> Loss:
    """The loss of the teacher's frozen U-Net with residuals of what sees outlines; the captions name no shape, so that
    only the outline determines it."""
    drawings = random_drawings(recipe.drawings, checkpoints.step_generator(seed, CONTROLNET_STAGE, 10**7))
    latents = autoencoder.encode(teacher.vae, draw(drawings, recipe.size))
    teacher.unet.requires_grad_(False)

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(drawings), (recipe.batch,), generator=generator)
        some = drawings.pick(chosen)
        hints = outlines(some, recipe.size)
        captions = [
            said if said.shape is None else caption(SHAPELESS, background=int(some.background[at]))
            for at, said in enumerate(random_captions(some, generator))
        ]

        def controlled(noisy: torch.Tensor, *given: torch.Tensor, **further: Any) -> Any:
            added = residuals(hints.to(noisy), noisy, *given, **further)
            return teacher.unet(noisy, *given, **added, **further)

        return noise_loss(teacher, controlled, recipe, latents[chosen], captions, generator)

    return loss


def noise_loss(
    teacher: StableDiffusionXLPipeline,
    model: Callable[..., Any],
    recipe: Recipe,
    latents: torch.Tensor,
    captions: list[Caption],
    generator: torch.Generator,
) -> torch.Tensor:
    """The error of ``model``, a U-Net or what calls one, on latents [n, 4, h, w] of drawings with n captions."""
    context, pooled = embedded(teacher, [said.text for said in captions])
    keep = (torch.rand(len(captions), generator=generator) >= recipe.drop).float().unsqueeze(1)
    conditions = context * keep.unsqueeze(2), pooled * keep
    given = denoiser.shown(recipe.size, latents, *conditions, generator)
    return denoiser.noise_loss(model, given.to(teacher.unet.device))


def embedded(teacher: StableDiffusionXLPipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Context [n, 77, c] and pooled [n, d] of n texts, on the CPU; differentiable, where the text encoders are."""
    encoders = text.Encoders(teacher.text_encoder, teacher.text_encoder_2)
    tokens = text.tokenize(teacher.tokenizer, texts).to(teacher.unet.device)
    context, pooled = encoders(tokens)
    return context.cpu(), pooled.cpu()


def minimise(
    loss: Loss,
    parameters: Iterable[Parameter] | Iterable[dict[str, Any]],
    recipe: Recipe,
    stage: int,
    seed: int,
    log: Log,
) -> None:
    """Minimise the loss over the recipe's steps, in place. Of groups of parameters ``share`` is the learning rate as a
    share of the recipe's."""
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    running = None
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / recipe.warm)
            rate = recipe.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
            group["lr"] = rate * group.get("share", 1.0)
        found = loss(checkpoints.step_generator(seed, stage, step))
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        optimizer.step()
        value = float(found.detach())
        running = value if running is None else 0.95 * running + 0.05 * value
        if (step + 1) % 25 == 0:
            log(f"{step + 1}/{recipe.steps} loss={running:.4f}")


def save_controlnet(control: ControlNetModel, path: Path) -> None:
    """Write a ControlNet of sdxl-tiny under ComfyUI's names: its loader accepts diffusers' only at SDXL's own
    widths."""
    theirs, ours = (adapters.controlnet(CONTROLNET_LAYOUT, numbering=names) for names in ("diffusers", "comfy"))
    names = dict(zip(theirs, ours, strict=True))
    save({names[name]: tensor for name, tensor in control.state_dict().items()}, path)


def save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write fp16 weights to a temporary file, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, replace=True) as aside:
        write_safetensors(aside, {name: tensor.detach().half() for name, tensor in state.items()}, {})
