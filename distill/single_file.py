"""diffusers' pipeline of an SDXL checkpoint that is a single file, built by diffusers' own converters, offline.

Such a file holds no tokenizer: CLIP's vocabulary comes from a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..koala.architecture import keys
from ..koala.architecture.component_detection import read_autoencoder, read_text_encoder
from ..koala.architecture.components import LATENT_SCALE, PROMPT_TOKENS, TextEncoder
from ..koala.architecture.detection import read_layout
from ..koala.files.conventions import CLIP_PREFIXES, UNET_PREFIX, VAE_PREFIX
from ..koala.files.export import unet_config
from ..koala.releases import SCHEDULER_CONFIG

State = dict[str, torch.Tensor]


def pipeline(checkpoint: Path, tokenizer: Path, with_unet: bool = True) -> StableDiffusionXLPipeline:
    """The checkpoint's pipeline, fp32 on the CPU.

    Args:
        checkpoint: a .safetensors file with ComfyUI's names.
        tokenizer: a folder with CLIP's vocabulary, as transformers reads it.
        with_unet: False leaves the U-Net out, and does not read it.

    Raises KeyError with the name of a tensor that the text encoders or the VAE lack.
    """
    with safe_open(checkpoint, framework="pt") as file:
        wanted = (name for name in file.keys() if with_unet or not name.startswith(UNET_PREFIX))  # noqa: SIM118
        state = {name: file.get_tensor(name).float() for name in wanted}
    first, second = tokenizers(tokenizer)
    made = StableDiffusionXLPipeline(
        vae=_vae(_under(state, VAE_PREFIX)),
        text_encoder=_clip_l(_under(state, f"{CLIP_PREFIXES[0]}transformer.")),
        text_encoder_2=_clip_g(_under(state, f"{CLIP_PREFIXES[1]}model.")),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet(_under(state, UNET_PREFIX)) if with_unet else None,
        scheduler=EulerDiscreteScheduler.from_config(dict(SCHEDULER_CONFIG)),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """CLIP's tokenizer as SDXL uses it twice: padded with the end token for CLIP-L and with "!" (id 0) for CLIP-G."""
    return (
        CLIPTokenizer.from_pretrained(folder, model_max_length=PROMPT_TOKENS),
        CLIPTokenizer.from_pretrained(folder, model_max_length=PROMPT_TOKENS, pad_token="!"),
    )


def unet(state: State) -> UNet2DConditionModel:
    """diffusers' U-Net, fp32, from tensors under any names."""
    layout, numbering = read_layout(keys.shapes_of(state))
    names = keys.renaming(layout, numbering, "diffusers")
    with torch.device("meta"):
        model = UNet2DConditionModel(**unet_config(layout))
    return _filled(model, {names[name]: tensor.float() for name, tensor in state.items()})


def _under(state: State, prefix: str) -> State:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _filled(model: Any, state: State) -> Any:
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _clip_l(state: State) -> CLIPTextModel:
    state.pop("text_model.embeddings.position_ids", None)
    return _text_model(CLIPTextModel, state, "quick_gelu")


def _clip_g(state: State) -> CLIPTextModelWithProjection:
    return _text_model(CLIPTextModelWithProjection, convert_open_clip_checkpoint(None, state, prefix=""), "gelu")


def _text_model(kind: Any, state: State, activation: str) -> Any:
    """A text encoder, whichever prefix this version of transformers gives its tensors."""
    model = kind(_clip_config(read_text_encoder(keys.shapes_of(state)), activation))
    bare = not any(name.startswith("text_model.") for name in model.state_dict())
    return _filled(
        model, {name.removeprefix("text_model.") if bare else name: tensor for name, tensor in state.items()}
    )


def _clip_config(size: TextEncoder, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_hidden_layers=size.layers,
        projection_dim=size.projection or size.hidden,
        hidden_act=activation,
    )


def _vae(state: State) -> AutoencoderKL:
    size = read_autoencoder(keys.shapes_of(state))
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(size.channels),
        up_block_types=["UpDecoderBlock2D"] * len(size.channels),
        block_out_channels=list(size.channels),
        layers_per_block=size.layers,
        latent_channels=size.latent_channels,
        scaling_factor=LATENT_SCALE,
        force_upcast=False,
    )
    return _filled(model, convert_ldm_vae_checkpoint(state, dict(model.config)))
