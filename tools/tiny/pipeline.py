"""koala-tiny as a diffusers pipeline: assembled, saved as a folder, loaded, sampled."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer

from koala_sdxl.koala.files.atomic_write import written_whole
from tools.tiny import denoiser, text


def assemble(
    vae: AutoencoderKL,
    encoders: text.Encoders,
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    """The models as diffusers' SDXL pipeline; an empty negative prompt means zeros, as for every SDXL base model."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders.l,
        text_encoder_2=encoders.g,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=denoiser.new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the folder in fp16, completely or not at all. The pipeline itself is rounded to fp16 values in place."""
    pipeline.to(torch.float16)
    with written_whole(folder, replace=True) as aside:
        pipeline.save_pretrained(aside, variant="fp16", safe_serialization=True)
    pipeline.to(torch.float32)


def load(folder: Path) -> StableDiffusionXLPipeline:
    """Load a folder's pipeline, computing in float32."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, variant="fp16", torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def pictures(
    pipeline: StableDiffusionXLPipeline,
    prompts: list[str],
    negative: str = "",
    seed: int = 0,
    size: int = 128,
    steps: int = 25,
    cfg: float = 7.5,
    batch: int = 36,
) -> torch.Tensor:
    """One image per prompt, float32 [n, 3, size, size] in [-1, 1]; image i starts from noise of seed + i."""
    parts = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        made = pipeline(
            prompt=some,
            negative_prompt=[negative] * len(some) if negative else None,  # None: zeros, as KOALA Prompt does
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=cfg,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(some))],
            output_type="pt",
        )
        parts.append(made.images.cpu() * 2 - 1)
    return torch.cat(parts)
