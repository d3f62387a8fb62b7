"""diffusers' engine: StableDiffusionXLPipeline's parts and its denoising loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch._inductor import config as inductor

from koala_sdxl.koala.architecture.components import LATENT_SCALE
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from tools.measure.bench.engines import CFG, Job, named


class Diffusers:
    """fp32 on the CPU, fp16 on a GPU; the VAE in fp32, as the pipeline has SDXL's."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.dtype = torch.float16 if device == "cuda" else torch.float32
        self.parts: list[Any] = []
        self.unet: Any = None
        self.vae: Any = None

    def load(self, folder: Path) -> None:
        pipe = StableDiffusionXLPipeline.from_pretrained(
            folder, variant="fp16", torch_dtype=self.dtype, add_watermarker=False
        ).to(self.device)
        self.unet, self.vae = pipe.unet, pipe.vae
        self.parts = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]

    def load_unet(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", variant="fp16", torch_dtype=self.dtype)
        self.parts.append(self.unet.to(self.device))

    def load_vae(self, folder: Path) -> None:
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", variant="fp16", torch_dtype=torch.float32)
        self.parts.append(self.vae.to(self.device))

    def weights(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in part.state_dict().values())

    def types(self) -> dict[str, str]:
        parts = {"unet": self.unet, "vae": self.vae}
        return {name: named(part.dtype) for name, part in parts.items() if part is not None}

    def denoise(self, todo: Job) -> torch.Tensor:
        batch, _, height, width = todo.noise.shape
        scheduler = EulerDiscreteScheduler.from_config(dict(SCHEDULER_CONFIG))
        scheduler.set_timesteps(25, device=self.device)  # as the pipeline does: else each step waits for the GPU
        place: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        size = torch.tensor([[8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width]] * 2 * batch, **place)
        context, pooled = (rows.repeat_interleave(batch, 0).to(**place) for rows in (todo.context, todo.pooled))
        added = {"text_embeds": pooled, "time_ids": size}
        x = (todo.noise * scheduler.init_noise_sigma).to(**place)
        for time in scheduler.timesteps[: todo.steps]:
            self.begin_step()
            both = scheduler.scale_model_input(torch.cat([x, x]), time)
            without, towards = self.unet(both, time, context, added_cond_kwargs=added).sample.chunk(2)
            x = scheduler.step(without + CFG * (towards - without), time, x).prev_sample
        return x.cpu() / LATENT_SCALE

    def begin_step(self) -> None:
        """What is to be told before each step."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        picture = self.vae.to(torch.float32).decode(latent.to(self.device)).sample
        return (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu()


FLAGS = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}
"""Of the inductor, for everything that the process compiles."""
TILE = 512
"""px of a tile, half of what SDXL's VAE has by default: it would decode 1024 px in one."""


class Fast(Diffusers):
    """By diffusers' documented fast settings: fused projections, channels_last, compiled with ``FLAGS``, which is with
    CUDA graphs.

    https://huggingface.co/docs/diffusers/optimization/fp16, as of 0.42.
    """

    def load_unet(self, folder: Path) -> None:
        super().load_unet(folder)
        self._speed_up()

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._speed_up()

    def begin_step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step's graph has written was used

    def _speed_up(self) -> None:
        self.unet.fuse_qkv_projections()
        self.unet.to(memory_format=torch.channels_last)
        if self.device == "cuda":
            for name, value in FLAGS.items():
                setattr(inductor, name, value)
        self.unet.compile(mode="max-autotune" if self.device == "cuda" else None, fullgraph=True)
        if self.vae is not None:
            self.vae.to(memory_format=torch.channels_last)


class Offloading(Diffusers):
    """With diffusers' offload of whole models: each is on the GPU only while it computes; the VAE decodes in tiles of
    ``TILE`` px."""

    pipe: Any = None

    def load(self, folder: Path) -> None:
        self.pipe = pipe = StableDiffusionXLPipeline.from_pretrained(
            folder, variant="fp16", torch_dtype=self.dtype, add_watermarker=False
        )
        if self.device == "cuda":
            pipe.enable_model_cpu_offload()
        in_tiles(pipe.vae)
        self.unet, self.vae = pipe.unet, pipe.vae
        self.parts = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        picture = super().decode(latent)
        self.pipe.maybe_free_model_hooks()  # as the pipeline ends: else the VAE stays beside the next image's U-Net
        return picture


def in_tiles(vae: Any) -> None:
    """Have a VAE decode what is larger than a tile in tiles."""
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // 8


ENGINES = {"diffusers": Diffusers, "diffusers, fast": Fast, "diffusers, offload": Offloading}
