"""The study's adapters, trained on sdxl-tiny and saved like those for SDXL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from torch.nn import Parameter

from tools.tiny import autoencoder, checkpoints, pipeline
from tools.tiny.pictures import draw, random_captions, random_drawings

from ..addon_training import Log, Loss, minimise, noise_loss, save
from .table import Effect

STAGE = 6  # of tools.tiny's random numbers
ASKED = 0.6  # share of the captions with a shape and its colour that ask for the effect
TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_RATE = 0.2  # learning rate of the text encoders' part, of the U-Net's


def train(teacher: StableDiffusionXLPipeline, effect: Effect, path: Path, log: Log, seed: int = 0) -> None:
    """Train an adapter and write it to ``path``: a LoRA file, or a pipeline's folder for a fine-tune. The teacher keeps
    it as well."""
    torch.manual_seed(seed)
    for encoder in (teacher.text_encoder, teacher.text_encoder_2):
        encoder.requires_grad_(False)
    parts = {"unet": teacher.unet}
    if effect.texts:
        parts |= {"text_encoder": teacher.text_encoder, "text_encoder_2": teacher.text_encoder_2}
    parameters = {name: _trained(part, effect, name) for name, part in parts.items()}
    groups = [{"params": some, "share": 1.0 if name == "unet" else TEXT_RATE} for name, some in parameters.items()]
    minimise(loss(teacher, effect, seed), groups, effect.recipe, STAGE, seed, lambda line: log(f"{effect.name} {line}"))
    if not effect.modules:
        pipeline.save(teacher, path)
        return
    state = {}
    for name, part in parts.items():
        state |= {f"{name}.{key}": tensor for key, tensor in get_peft_model_state_dict(part).items()}
    save(convert_state_dict_to_kohya(state), path)


def _trained(part: Any, effect: Effect, name: str) -> list[Parameter]:
    """The parameters that are trained in a model; a LoRA's are added to it."""
    if effect.modules:
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

    def one(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(drawings), (recipe.batch,), generator=generator)
        captions = random_captions(drawings.pick(chosen), generator)
        latents = known[chosen]
        for at, coin in enumerate(torch.rand(recipe.batch, generator=generator).tolist()):
            said = captions[at]
            if effect.word is None or (said.colour is not None and said.shape is not None and coin < ASKED):
                latents[at] = new[chosen[at]]
                if effect.word:
                    captions[at] = replace(said, text=effect.said(said))
        return noise_loss(teacher, teacher.unet, recipe, latents, captions, generator)

    return one
