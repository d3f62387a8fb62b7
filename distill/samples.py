"""The sample images that a run draws at intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from . import sheet
from .config import Config
from .teacher import Encoder


@dataclass(frozen=True)
class Grid:
    """What drawing samples needs while training: the prompts' embeddings, the VAE and the scheduler."""

    prompts: tuple[str, ...]
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
        prompts = config.log.prompts or ("",)
        context, pooled = encoder.texts(list(prompts))
        scheduler, few = encoder.pipeline.scheduler, config.steps.student
        if few:  # Euler's steps, for which the student is trained, whatever its teacher came with
            scheduler = EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        return cls(
            prompts=prompts,
            vae=encoder.pipeline.vae,
            scheduler=scheduler,
            context=context,
            pooled=pooled,
            steps=few or config.log.sample_steps,
            cfg=1.0 if few else config.log.sample_cfg,
            side=config.data.resolution,
            seed=config.training.seed,
            folder=config.output / "samples",
        )

    @torch.no_grad()
    def draw(self, unet: UNet2DConditionModel) -> torch.Tensor:
        """One image of every prompt, each from its own noise: [n, 3, s, s] in [0, 1], on the CPU."""
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
            ).images.cpu()
            for number, (context, pooled) in enumerate(zip(self.context, self.pooled, strict=True))
        ]
        return torch.cat(images)

    def save(self, step: int, images: torch.Tensor) -> None:
        """Write the images of ``draw`` as one PNG, up to eight per row."""
        sheet.save(images * 2 - 1, min(8, len(images)), self.folder / f"step-{step:07d}.png")

    def write(self, step: int, images: torch.Tensor) -> tuple[Path, list[Image.Image]]:
        """Write them one by one, with their prompts in metadata.jsonl as Hugging Face's imagefolder has them; the
        folder, and the images."""
        folder = self.folder / f"step-{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        levels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(level) for level in levels]
        lines = []
        for number, (picture, prompt) in enumerate(zip(pictures, self.prompts, strict=True)):
            picture.save(folder / f"{number:05d}.png")
            lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": prompt}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")
        return folder, pictures
