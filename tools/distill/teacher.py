"""SDXL as the teacher: its U-Net from a folder or a single file, and, when they are needed, the parts beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from koala.export import unet_config
from koala.layout import Layout, name
from koala.lineage import is_teacher
from tools import lineage, reference, testhost
from tools.distill.config import TeacherTable
from tools.problem import Problem

BESIDE = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "vae")
"""Folders of SDXL's parts but the U-Net."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A model with SDXL's layers at any width."""

    table: TeacherTable
    file: lineage.UNet

    @property
    def layout(self) -> Layout:
        return self.file.layout

    @property
    def name(self) -> str:
        return self.table.model.name

    @property
    def identity(self) -> dict[str, str]:
        """What tells one teacher's latents and text embeddings from another's."""
        return {"teacher": self.name, "file": f"{self.file.path.stat().st_size} bytes"}

    @cached_property
    def noise(self) -> DDPMScheduler:
        """The noise schedule that it was trained with."""
        folder = self.table.model / "scheduler"
        if folder.is_dir():
            return DDPMScheduler.from_pretrained(folder)
        return DDPMScheduler.from_config(dict(reference.SCHEDULER_CONFIG))

    def unet(self) -> UNet2DConditionModel:
        """Its U-Net, frozen, in the type that the configuration names; read tensor by tensor."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config(self.layout))
        unet.load_state_dict(self.file.weights(DTYPES[self.table.dtype]), strict=True, assign=True)
        return unet.eval().requires_grad_(False)

    def pipeline(self, unet: UNet2DConditionModel | None) -> StableDiffusionXLPipeline:
        """diffusers' pipeline of the teacher's other parts, in fp32, around a U-Net or none."""
        folder = self.table.model
        if not folder.is_dir():
            return reference.pipeline(folder, testhost.test_host().folder / "comfy" / "sd1_tokenizer", unet)
        absent = [part for part in BESIDE if not (folder / part).is_dir()]
        half = any((folder / "text_encoder").glob("*.fp16.safetensors"))
        try:
            if absent:  # without a tokenizer's folder transformers makes one that knows no words
                raise OSError(f"it has no {' and no '.join(absent)}.")
            made = StableDiffusionXLPipeline.from_pretrained(
                folder,
                unet=unet,
                variant="fp16" if half else None,
                torch_dtype=torch.float32,
                add_watermarker=False,
                local_files_only=True,
            )
        except (OSError, ValueError) as error:
            raise Problem(
                f"teacher.model: {folder} is no whole SDXL folder: {str(error).splitlines()[0]} Expected text "
                f"encoders, tokenizers, scheduler and VAE beside the U-Net. Fetch it again, or give a single file."
            ) from None
        made.set_progress_bar_config(disable=True)
        return made


def open_teacher(table: TeacherTable) -> Teacher:
    """Look at the headers of a teacher's files. Raises Problem for anything that has not SDXL's layers."""
    if not table.model.exists():
        raise Problem(f"teacher.model: {table.model} is not there; expected SDXL, a folder or a .safetensors file.")
    file = lineage.open_unet(table.model, "SDXL")
    if not is_teacher(file.layout):
        raise Problem(
            f"teacher.model: {table.model} is a {name(file.layout)}; expected SDXL's own layers, of which the student "
            f"keeps some. Give an SDXL model, with or without merged LoRAs."
        )
    teacher = Teacher(table, file)
    if (kind := teacher.noise.config.prediction_type) != "epsilon":
        raise Problem(
            f"teacher.model: {table.model} predicts {kind}, as its scheduler says; expected epsilon, as SDXL and every "
            f"KOALA does. Give an SDXL that predicts epsilon."
        )
    return teacher


class Encoder:
    """Pictures and captions into what the U-Nets see, by the teacher's parts."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self.pipeline = pipeline
        self.device = device
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            part.to(device)

    @torch.no_grad()
    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents [n, 4, h/8, w/8], scaled, of pictures [n, 3, h, w] in [-1, 1]; fp32 on the CPU. The mean of the
        encoder's distribution: it is computed once, and SDXL's varies little around it."""
        vae = self.pipeline.vae
        return (vae.encode(pictures.to(self.device)).latent_dist.mode() * vae.config.scaling_factor).cpu()

    @torch.no_grad()
    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Context [n, 77, c] and pooled [n, p]; fp32 on the CPU."""
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return context.cpu(), pooled.cpu()
