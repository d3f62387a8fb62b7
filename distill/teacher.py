"""SDXL as the teacher: its U-Net from a folder or a single file and, when needed, its text encoders and VAE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.peft_utils import recurse_remove_peft_layers

from ..koala.architecture.layout import Layout, is_subnetwork, name
from ..koala.architecture.lineage import KeptTransformers, is_teacher
from ..koala.files.config import stated_transformers
from ..koala.files.conventions import CLIP_PREFIXES, VAE_PREFIX
from ..koala.files.dtypes import TORCH_DTYPES
from ..koala.files.export import unet_config
from ..koala.files.header import CheckpointError, read_header
from ..koala.files.unet_weights import UNetWeights, open_unet
from ..koala.releases import SCHEDULER_CONFIG
from . import identity, single_file, tokenizer
from .config import TeacherTable
from .errors import UserError
from .texts import TextEncoders

TEXT = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
MODELS = (*TEXT, "vae")
OTHERS = (*TEXT, *TOKENIZERS, "scheduler", "vae")
"""Subfolders of SDXL's folder beside that of the U-Net."""
PREDICTION_MARKS = {"v_pred": "v_prediction", "edm_vpred.sigma_max": "v_prediction", "edm_mean": "edm"}
"""Tensors by which a single file says, to ComfyUI as well, that its U-Net does not predict the noise."""


@dataclass(frozen=True)
class Teacher:
    """A model with SDXL's layers at any width; for a step distillation, one with some of them."""

    table: TeacherTable
    file: UNetWeights

    @property
    def layout(self) -> Layout:
        return self.file.layout

    @property
    def name(self) -> str:
        return self.table.model.name

    @cached_property
    def kept_transformers(self) -> KeptTransformers | None:
        """Which of SDXL's transformer blocks its file says that it kept. Raises UserError where that does not fit."""
        try:
            return stated_transformers(read_header(self.file.path), self.layout)
        except CheckpointError as error:
            raise UserError(f"teacher.model: {error}") from None

    @cached_property
    def identity(self) -> dict[str, str]:
        """What distinguishes one teacher's latents and text embeddings from another's."""
        return identity.of_encoders(self.table, self.tokenizer)

    @property
    def files(self) -> list[Path]:
        """What its U-Net, text embeddings and noise schedule are read from: the U-Net's weights first."""
        model, own = self.table.model, self.table.tokenizer == "teacher"
        tokenizers = [model / part for part in TOKENIZERS] if own else [self.tokenizer]
        found = [file for part in TEXT for file in identity.used(model / part)]
        found += [file for folder in tokenizers for kind in ("*.json", "*.txt") for file in sorted(folder.glob(kind))]
        return [self.file.path, *found, *sorted((model / "scheduler").glob("*.json"))]

    @property
    def tokenizer(self) -> Path:
        """Folder of CLIP's tokenizer."""
        own = self.table.tokenizer == "teacher"
        return self.table.model / "tokenizer" if own else Path(self.table.tokenizer)

    @cached_property
    def noise(self) -> DDPMScheduler:
        """The noise schedule with which it was trained. Raises UserError for a folder's that cannot be read."""
        folder = self.table.model / "scheduler"
        if folder.is_dir():
            try:
                return DDPMScheduler.from_pretrained(folder)
            except (OSError, ValueError, NotImplementedError) as error:
                raise UserError(
                    f"teacher.model: {folder} holds no noise schedule ({str(error).splitlines()[0]}); expected SDXL's "
                    f"scheduler_config.json. Fetch it again."
                ) from None
        header = read_header(self.file.path)
        stated = [kind for mark, kind in PREDICTION_MARKS.items() if mark in header.shapes]
        if header.metadata.get("modelspec.predict_key") == "v":
            stated.append("v_prediction")
        return DDPMScheduler.from_config({**SCHEDULER_CONFIG, "prediction_type": [*stated, "epsilon"][0]})

    def unet(self) -> UNet2DConditionModel:
        """Its U-Net with the LoRAs merged, frozen, in the configured data type; read tensor by tensor."""
        unet = self._empty()
        dtype = TORCH_DTYPES["bf16" if self.table.dtype == "fp8" else self.table.dtype]
        # merged in fp32, so that small changes are not rounded away one by one
        weights = self.file.weights(torch.float32 if self.table.loras else dtype)
        unet.load_state_dict(weights, strict=True, assign=True)
        for state, alphas, metadata in self.loras():
            StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
            unet.fuse_lora()
            unet.unload_lora()
        return unet.to(dtype).eval().requires_grad_(False)

    def in_place(self, unet: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
        """Its U-Net on the device where it computes; with ``fp8`` each layer keeps its weights in float8_e4m3fn, and
        casts them to bf16 for its own forward pass."""
        if self.table.dtype == "fp8":
            unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        return unet.to(device)

    def loras(self) -> list[tuple[dict[str, torch.Tensor], Any, Any]]:
        """Each LoRA as diffusers reads it: tensors, alphas, metadata. Raises UserError for one that it cannot read."""
        config, loras = self._empty().config, []
        for path in self.table.loras:
            try:
                read_header(path, "a LoRA")
                read = StableDiffusionXLPipeline.lora_state_dict(
                    str(path), unet_config=config, return_lora_metadata=True
                )
                if not all("lora" in key for key in read[0]):
                    raise ValueError("it is not a LoRA, or of a kind that diffusers does not know")
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"teacher.loras: {path} cannot be merged ({error}); expected an SDXL LoRA that diffusers reads. "
                    f"Merge it with another tool, and give the merged model."
                ) from None
            loras.append(read)
        return loras

    def pipeline(self) -> StableDiffusionXLPipeline:
        """diffusers' pipeline of its text encoders and VAE without the U-Net: LoRAs merged, fp32, on the CPU."""
        made = self._pipeline()
        for state, alphas, metadata in self.loras():
            for part in TEXT:
                made.load_lora_into_text_encoder(state, alphas, getattr(made, part), prefix=part, metadata=metadata)
            made.fuse_lora(components=list(TEXT))
            for part in TEXT:
                recurse_remove_peft_layers(getattr(made, part))
        return made

    def _empty(self) -> UNet2DConditionModel:
        """Its U-Net on the meta device."""
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(unet_config(self.layout))

    def _pipeline(self) -> StableDiffusionXLPipeline:
        folder = self.table.model
        if not folder.is_dir():
            return single_file.pipeline(folder, self.tokenizer, with_unet=False)
        own: dict[str, Any] = {"unet": None}
        if self.table.tokenizer != "teacher":
            own |= dict(zip(TOKENIZERS, single_file.tokenizers(self.tokenizer), strict=True))
        self.require_parts()
        half = any((folder / "text_encoder").glob("*.fp16.safetensors"))
        try:
            made = StableDiffusionXLPipeline.from_pretrained(
                folder,
                **own,
                variant="fp16" if half else None,
                torch_dtype=torch.float32,
                add_watermarker=False,
                local_files_only=True,
            )
        except (OSError, ValueError) as error:
            raise self._incomplete(str(error).splitlines()[0]) from None
        made.set_progress_bar_config(disable=True)
        return made

    def require_parts(self) -> None:
        """Check, by names and headers, what ``pipeline`` reads of a folder. Raises UserError where something is
        missing or damaged."""
        folder = self.table.model
        if not folder.is_dir():
            return
        if absent := _absent(folder, OTHERS if self.table.tokenizer == "teacher" else (*MODELS, "scheduler")):
            raise self._incomplete(f"it has no {' and no '.join(absent)}.")
        try:
            for file in (file for part in MODELS for file in identity.used(folder / part)):
                if file.suffix == ".safetensors":
                    read_header(file)
            for part in TOKENIZERS if self.table.tokenizer == "teacher" else ():
                tokenizer.read_files(folder / part)
        except (CheckpointError, UserError) as error:
            raise self._incomplete(str(error).splitlines()[0]) from None

    def _incomplete(self, why: str) -> UserError:
        return UserError(
            f"teacher.model: {self.table.model} is not a complete SDXL folder: {why} Expected "
            f"text encoders, tokenizers, scheduler and VAE beside the U-Net. Fetch it again, or give a single file."
        )


def _absent(folder: Path, parts: Iterable[str]) -> list[str]:
    """What is not there of a folder with these subfolders, by name. Without a tokenizer's, transformers makes one
    without a vocabulary."""
    found = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
    for part in parts:
        files = {path.suffix for path in identity.used(folder / part)}
        if not (folder / part).is_dir():
            found.append(part)
        elif part in MODELS and files <= {".json"}:
            found.append(f"weights in {part}")
        elif part in MODELS and not (folder / part / "config.json").is_file():
            found.append(f"{part}/config.json")
    return found


def open_teacher(table: TeacherTable, compact: bool = False) -> Teacher:
    """Read the headers of a teacher's files; ``compact``: it may be a KOALA.

    Raises UserError for anything without SDXL's layers, or incomplete.
    """
    models = "SDXL or a KOALA" if compact else "SDXL"
    model = ("model", table.model, f"{models}, a folder or a .safetensors file")
    for key, path, wanted in (model, *(("loras", path, "a .safetensors file") for path in table.loras)):
        if not path.exists():
            raise UserError(f"teacher.{key}: {path} does not exist; expected {wanted}.")
    try:
        file = open_unet(table.model, models)
    except CheckpointError as error:
        raise UserError(f"teacher.model: {error}") from None
    if not (is_teacher(file.layout) or (compact and is_subnetwork(file.layout))):
        raise UserError(
            f"teacher.model: {table.model} is a {name(file.layout)}; expected all of SDXL's layers, of which the "
            f"student keeps some. Give an SDXL model, with or without merged LoRAs."
        )
    if table.loras and not is_teacher(file.layout):
        raise UserError(
            f"teacher.loras: {table.model} is a {name(file.layout)}, whose layers SDXL's LoRAs do not name as its own; "
            f"expected none. Merge them with KOALA LoRA Loader and KOALA Checkpoint Save, and give the file that makes."
        )
    teacher = Teacher(table, file)
    if (kind := teacher.noise.config.prediction_type) != "epsilon":
        raise UserError(
            f"teacher.model: {table.model} says that it predicts {kind}; expected epsilon, as SDXL and every KOALA "
            f"do. Give an SDXL that predicts epsilon."
        )
    if table.model.is_file():
        _require_other_models(table.model)
    if table.model.is_file() and table.tokenizer == "teacher":
        raise UserError(
            f"teacher.tokenizer: {table.model} is a single file, which holds no tokenizer; expected a folder with "
            f"CLIP's. Give the folder tokenizer/ of an SDXL, or comfy/sd1_tokenizer of a ComfyUI."
        )
    if table.tokenizer != "teacher" or teacher.tokenizer.is_dir():
        tokenizer.read_files(teacher.tokenizer)
    teacher.loras()
    return teacher


def _require_other_models(path: Path) -> None:
    """Check that a single file has text encoders and a VAE. Raises UserError where one is missing."""
    header = read_header(path)
    prefixes = {"CLIP-L": CLIP_PREFIXES[0], "CLIP-G": CLIP_PREFIXES[1], "VAE": VAE_PREFIX}
    if absent := [model for model, prefix in prefixes.items() if not header.under(prefix)]:
        raise UserError(
            f"teacher.model: {path} has no {' and no '.join(absent)}; expected an SDXL checkpoint with text encoders "
            f"and VAE. Give such a file, or a Hugging Face folder."
        )


class Encoder:
    """Encodes images and captions with the teacher's VAE and text encoders."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self.pipeline = pipeline
        self.device = device
        self.text_encoders = TextEncoders.of(pipeline, device)
        pipeline.vae.to(device)

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [n, 4, h/8, w/8], scaled, of images [n, 3, h, w] in [-1, 1]; fp32 on the CPU. They are the means of
        the encoder's distributions: computed once, and SDXL's variances are small."""
        vae = self.pipeline.vae
        return (vae.encode(images.to(self.device)).latent_dist.mode() * vae.config.scaling_factor).cpu()

    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Context [n, 77, c] and pooled [n, p]; fp32 on the CPU."""
        context, pooled = self.text_encoders.embed(self.tokens(captions))
        return context.cpu(), pooled.cpu()

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """int64 [n, 2, 77]; see ``TextEncoders.tokens``."""
        return self.text_encoders.tokens(captions)

    def lengths(self, captions: list[str]) -> list[int]:
        """The tokens of each caption, start and end included, however many they are."""
        return self.text_encoders.lengths(captions)
