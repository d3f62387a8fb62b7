"""The study's adapters, trained on sdxl-tiny and saved like those for SDXL."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from torch.nn import Parameter

from tools.tiny import autoencoder, checkpoints, pipeline
from tools.tiny.pictures import draw, random_captions, random_drawings

from ...config import LossTable, StepsTable
from ...few_steps import StepObjective
from ..addon_training import Log, Loss, embedded, minimise, noise_loss, save, train_controlnet
from . import t2i
from .table import Effect, Use, plain

STAGE = 6  # of tools.tiny's random numbers
ASKED = 0.6  # share of the captions that ask for the effect by its word
TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_RATE = 0.2  # learning rate of the text encoders' part, of the U-Net's


def train(teacher: StableDiffusionXLPipeline, effect: Effect, path: Path, log: Log, seed: int = 0) -> None:
    """Train an adapter and write it to ``path``: a file, or a pipeline's folder for a fine-tune. The teacher keeps it,
    too."""
    if effect.kind == "ControlNet":
        train_controlnet(teacher, path, log, effect.recipe, seed)
        return
    if effect.kind == "T2I-Adapter":
        t2i.train(teacher, path, log, effect.recipe, seed)
        return
    torch.manual_seed(seed)
    for encoder in (teacher.text_encoder, teacher.text_encoder_2):
        encoder.requires_grad_(False)
    parts = {"unet": teacher.unet}
    if effect.texts:
        parts |= {"text_encoder": teacher.text_encoder, "text_encoder_2": teacher.text_encoder_2}
    parameters = {name: _trained(part, effect, name) for name, part in parts.items()}
    groups = [{"params": some, "share": 1.0 if name == "unet" else TEXT_RATE} for name, some in parameters.items()]
    made = loss if effect.use == Use() else few_steps
    minimise(made(teacher, effect, seed), groups, effect.recipe, STAGE, seed, lambda line: log(f"{effect.name} {line}"))
    if effect.kind == "fine-tune":
        pipeline.save(teacher, path)
        return
    state: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        state |= {f"{name}.{key}": tensor for key, tensor in get_peft_model_state_dict(part).items()}
    save(convert_state_dict_to_kohya(state), path)


def _trained(part: Any, effect: Effect, name: str) -> list[Parameter]:
    """The parameters that are trained in a model; a LoRA's are added to it."""
    if effect.kind == "LoRA":
        part.requires_grad_(False)
        rank, modules = effect.recipe.rank, effect.modules if name == "unet" else TEXT_MODULES
        part.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules)))
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def loss(teacher: StableDiffusionXLPipeline, effect: Effect, seed: int) -> Loss:
    """The loss of the teacher with an adapter, on captioned drawings with the effect and without."""
    recipe = effect.recipe
    drawings = random_drawings(recipe.drawings, checkpoints.step_generator(seed, STAGE, 10**7))
    parts = [drawings.pick(some) for some in torch.arange(len(drawings)).split(100)]
    known, new = (
        torch.cat([autoencoder.encode(teacher.vae, made(part, recipe.size)) for part in parts])
        for made in (draw, effect.drawn)
    )

    whole = list(zip(drawings.shape.tolist(), drawings.colour.tolist(), drawings.background.tolist(), strict=True))

    def one(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(drawings), (recipe.batch,), generator=generator)
        captions = random_captions(drawings.pick(chosen), generator)
        latents = known[chosen]
        for at, coin in enumerate(torch.rand(recipe.batch, generator=generator).tolist()):
            if effect.word is None or coin < ASKED:
                latents[at] = new[chosen[at]]
            if effect.word and coin < ASKED:
                captions[at] = replace(captions[at], text=effect.said(plain(whole[chosen[at]])))
        return noise_loss(teacher, teacher.unet, recipe, latents, captions, generator)

    return one


def few_steps(teacher: StableDiffusionXLPipeline, effect: Effect, seed: int) -> Loss:
    """The loss of a step distillation: the teacher with an adapter learns from itself without it."""
    recipe = effect.recipe
    drawings = random_drawings(recipe.drawings, checkpoints.step_generator(seed, STAGE, 10**7))
    noise = DDPMScheduler.from_config(teacher.scheduler.config)
    table = StepsTable(student=effect.use.steps, teacher=Use().steps // effect.use.steps, guidance=Use().cfg)
    plain = copy.deepcopy(teacher.unet)
    plain.disable_adapters()
    objective = StepObjective(LossTable(), recipe.drop, table, noise, plain)

    def one(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(drawings), (recipe.batch,), generator=generator)
        said = [caption.text for caption in random_captions(drawings.pick(chosen), generator)]
        context, pooled = embedded(teacher, said)
        batch = {
            "latents": torch.empty(recipe.batch, 4, recipe.size // 8, recipe.size // 8),
            "context": context,
            "pooled": pooled,
            "ids": torch.tensor([[recipe.size, recipe.size, 0, 0, recipe.size, recipe.size]]).expand(recipe.batch, 6),
        }
        return objective.errors(teacher.unet, batch, generator)["output"]

    return one
