"""What every engine does: the same work on the same numbers. This pack, stock ComfyUI and diffusers are engines."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from koala_sdxl.koala.architecture.layout import Layout
from koala_sdxl.koala.schedule import schedule
from tools.harness import testhost

UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
VAE = "vae/diffusion_pytorch_model.fp16.safetensors"
CFG = 7.5


@dataclass(frozen=True)
class Job:
    """Some guided steps from random noise under random text, whose row 0 is the negative prompt, row 1 the prompt.

    ``noise`` (batch, 4, side / 8, side / 8), ``context`` (2, 77, width), ``pooled`` (2, width), ``steps``: of 25.
    """

    noise: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    steps: int

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels, one more than steps."""
        return schedule(25, "leading").sigmas[: self.steps + 1]


def job(layout: Layout, px: int, batch: int, steps: int) -> Job:
    """The same job for every engine."""
    generator = torch.Generator().manual_seed(3)
    return Job(
        torch.randn(batch, 4, px // 8, px // 8, generator=generator),
        torch.randn(2, 77, layout.context, generator=generator),
        torch.randn(2, layout.pooled, generator=generator),
        steps,
    )


def named(dtype: torch.dtype) -> str:
    """A type's name, such as "float16"."""
    return str(dtype).removeprefix("torch.")


class Engine(Protocol):
    """One way to make pictures. ``load*`` read from a diffusers folder; ``weights``: bytes of what was loaded."""

    def load(self, folder: Path) -> None:
        """U-Net, text encoders and VAE."""

    def load_unet(self, folder: Path) -> None: ...

    def load_vae(self, folder: Path) -> None: ...

    def weights(self) -> int: ...

    def types(self) -> dict[str, str]:
        """The types that the parts that are loaded compute in, such as {"vae": "bfloat16"}."""

    def denoise(self, todo: Job) -> torch.Tensor:
        """The latent after the job's steps, not yet scaled for the VAE."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Pictures of latents as the VAE takes them: (batch, height, width, 3) in 0..1."""


def activate(device: str) -> None:
    """ComfyUI in this process, on that device."""
    if "comfy" not in sys.modules:
        sys.path.insert(0, str(testhost.test_host().folder))  # first: the checkout has a folder named nodes, too
    from comfy.cli_args import args

    args.cpu = device == "cpu"  # read while comfy.model_management is imported, which nothing has done yet
