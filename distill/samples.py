"""The grid of sample images that a run draws at intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from . import sheet
from .config import Config
from .teacher import Encoder


@dataclass(frozen=True)
class Grid:
    """What drawing samples needs while training: the prompts' embeddings, the VAE and the scheduler."""

    vae: Any
    scheduler: EulerDiscreteScheduler
    context: torch.Tensor
    pooled: torch.Tensor
    steps: int
    cfg: float
    side: int
    seed: int
    folder: Path

    @classmethod
    def of(cls, config: Config, encoder: Encoder) -> Grid:
        """Encode the configuration's prompts, or the empty prompt."""
        context, pooled = encoder.texts(list(config.log.prompts) or [""])
        scheduler, few = encoder.pipeline.scheduler, config.steps.student
        return cls(
            vae=encoder.pipeline.vae,
            scheduler=scheduler.from_config(scheduler.config, timestep_spacing="trailing") if few else scheduler,
            context=context,
            pooled=pooled,
            steps=few or config.log.sample_steps,
            cfg=1.0 if few else config.log.sample_cfg,
            side=config.data.resolution,
            seed=config.training.seed,
            folder=config.output / "samples",
        )

    @torch.no_grad()
    def save(self, step: int, unet: UNet2DConditionModel) -> None:
        """Draw every prompt with a U-Net, each from its own noise, and write one PNG, up to eight images per row."""
        device = self.vae.device
        pipeline = StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet.to(device),
            scheduler=self.scheduler,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        images = [
            pipeline(
                prompt_embeds=context[None].to(device),
                pooled_prompt_embeds=pooled[None].to(device),
                negative_prompt_embeds=torch.zeros_like(context[None], device=device),
                negative_pooled_prompt_embeds=torch.zeros_like(pooled[None], device=device),
                height=self.side,
                width=self.side,
                num_inference_steps=self.steps,
                guidance_scale=self.cfg,
                generator=torch.Generator().manual_seed(self.seed + number),
                output_type="pt",
            ).images
            for number, (context, pooled) in enumerate(zip(self.context, self.pooled, strict=True))
        ]
        sheet.save(torch.cat(images).cpu() * 2 - 1, min(8, len(images)), self.folder / f"step-{step:07d}.png")
