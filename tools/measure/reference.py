"""The same weights in diffusers: what the pack's pictures are measured against.

Built from a ComfyUI-numbered checkpoint with diffusers' own converters for text encoders and autoencoder, so that the
judge shares no code with the pack but the U-Net's table of names, which the unit tests hold against diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from koala_sdxl.koala.architecture import components as parts
from koala_sdxl.koala.architecture import keys
from koala_sdxl.koala.files.export import unet_config
from koala_sdxl.koala.files.inspect import CLIP_PREFIXES, UNET_PREFIX, VAE_PREFIX
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from tools.harness import testhost
from tools.tiny import text


def pipeline(checkpoint: Path, network: Any = None) -> Any:
    """diffusers' ``StableDiffusionXLPipeline`` with a single-file checkpoint's weights, fp32 on the CPU.

    CLIP's vocabulary is the test host's. With a ``network``, that is the U-Net, and the file's own is not read.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with safe_open(checkpoint, framework="pt") as file:
        wanted = (name for name in file.keys() if network is None or not name.startswith(UNET_PREFIX))  # noqa: SIM118
        state = {name: file.get_tensor(name).float() for name in wanted}
    first, second = text.tokenizers(testhost.test_host().tokenizer)
    made = StableDiffusionXLPipeline(
        vae=_vae(_under(state, VAE_PREFIX)),
        text_encoder=_clip_l(_under(state, f"{CLIP_PREFIXES[0]}transformer.")),
        text_encoder_2=_clip_g(_under(state, f"{CLIP_PREFIXES[1]}model.")),
        tokenizer=first,
        tokenizer_2=second,
        unet=network or unet(_under(state, UNET_PREFIX)),
        scheduler=EulerDiscreteScheduler.from_config(dict(SCHEDULER_CONFIG)),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def unet(state: dict[str, torch.Tensor]) -> Any:
    """diffusers' U-Net, fp32, from tensors in any numbering."""
    from diffusers import UNet2DConditionModel

    layout, numbering = keys.read_layout(_shapes(state))
    names = keys.renaming(layout, numbering, "diffusers")
    with torch.device("meta"):
        model = UNet2DConditionModel(**unet_config(layout))
    return _filled(model, {names[name]: tensor.float() for name, tensor in state.items()})


def _under(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, keys.Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _filled(model: Any, state: dict[str, torch.Tensor]) -> Any:
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _clip_config(size: parts.TextEncoder, act: str) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_hidden_layers=size.layers,
        projection_dim=size.projection or size.hidden,
        hidden_act=act,
    )


def _clip_l(state: dict[str, torch.Tensor]) -> Any:
    from transformers import CLIPTextModel

    state.pop("text_model.embeddings.position_ids", None)
    model = CLIPTextModel(_clip_config(parts.read_text_encoder(_shapes(state)), "quick_gelu"))
    return _load_text(model, state)


def _clip_g(state: dict[str, torch.Tensor]) -> Any:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextModelWithProjection

    renamed = convert_open_clip_checkpoint(None, state, prefix="")
    model = CLIPTextModelWithProjection(_clip_config(parts.read_text_encoder(_shapes(renamed)), "gelu"))
    return _load_text(model, renamed)


def _load_text(model: Any, state: dict[str, torch.Tensor]) -> Any:
    """Fill a text encoder whichever prefix this version of transformers gives its tensors."""
    bare = not any(name.startswith("text_model.") for name in model.state_dict())
    return _filled(
        model, {name.removeprefix("text_model.") if bare else name: tensor for name, tensor in state.items()}
    )


def _vae(state: dict[str, torch.Tensor]) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    size = parts.read_autoencoder(_shapes(state))
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(size.channels),
        up_block_types=["UpDecoderBlock2D"] * len(size.channels),
        block_out_channels=list(size.channels),
        layers_per_block=size.layers,
        latent_channels=size.latent_channels,
        scaling_factor=0.13025,
        force_upcast=False,
    )
    return _filled(model, convert_ldm_vae_checkpoint(state, dict(model.config)))
