"""The same networks as diffusers and transformers build them, without weights: what our tables are held against."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from koala_sdxl.koala.architecture.keys import Shape
from koala_sdxl.koala.architecture.layout import Layout

Shapes = dict[str, Shape]


def shapes_of(make: Callable[[], torch.nn.Module]) -> Shapes:
    """Names and shapes of a network, built on the meta device."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def unet_model(layout: Layout, **changes: object) -> UNet2DConditionModel:
    """diffusers' U-Net of a layout, with its own settings changed where asked.

    diffusers gives the middle block the depth of the deepest stage's first layer: a layout's must be the same.
    """
    middle = {None: None, 0: "UNetMidBlock2D"}.get(layout.middle, "UNetMidBlock2DCrossAttn")
    settings: dict[str, object] = {
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if any(stage) else "DownBlock2D" for stage in layout.down),
        "mid_block_type": middle,
        "up_block_types": tuple("CrossAttnUpBlock2D" if any(stage) else "UpBlock2D" for stage in layout.up),
        "block_out_channels": layout.channels,
        "layers_per_block": [len(stage) for stage in layout.down],
        "transformer_layers_per_block": [stage if any(stage) else (layout.middle or 1,) for stage in layout.down],
        "reverse_transformer_layers_per_block": layout.up,
        "attention_head_dim": tuple(max(1, width // 64) for width in layout.channels),
        "cross_attention_dim": layout.context,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": layout.added,
    }
    return UNet2DConditionModel(**(settings | changes))


@cache
def unet(layout: Layout) -> Shapes:
    return shapes_of(lambda: unet_model(layout))


@cache
def clip_l(hidden: int = 768, layers: int = 12) -> Shapes:
    """SDXL's first text encoder, names with the ``text_model.`` that transformers 4 saved."""
    found = shapes_of(lambda: CLIPTextModel(_text_config(hidden, layers)))
    return {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in found.items()}


@cache
def clip_g(hidden: int = 1280, layers: int = 32) -> Shapes:
    """SDXL's second text encoder, with its projection."""
    return shapes_of(lambda: CLIPTextModelWithProjection(_text_config(hidden, layers)))


def _text_config(hidden: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, projection_dim=hidden
    )


def open_clip(found: Shapes) -> Shapes:
    """A text encoder's tensors under open_clip's names: query, key and value are one tensor."""
    renamed: Shapes = {"logit_scale": ()}
    for name, shape in found.items():
        name = name.removeprefix("text_model.").replace("encoder.layers.", "transformer.resblocks.")
        name = re.sub(r"layer_norm(\d)", r"ln_\1", name).replace("self_attn", "attn")
        name = (
            name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj").replace("final_layer_norm", "ln_final")
        )
        name = name.replace("embeddings.token_embedding", "token_embedding")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        if name == "text_projection.weight":
            renamed["text_projection"] = shape[::-1]
        elif joined := re.match(r"(.+\.attn\.)([qkv])_proj\.(.+)", name):
            renamed[f"{joined[1]}in_proj_{joined[3]}"] = (3 * shape[0], *shape[1:])
        else:
            renamed[name] = shape
    return renamed


@cache
def vae(channels: tuple[int, ...] = (128, 256, 512, 512), latent: int = 4) -> Shapes:
    """SDXL's autoencoder under diffusers names."""
    return shapes_of(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=2,
            latent_channels=latent,
        )
    )


def original_vae(found: Shapes) -> Shapes:
    """An autoencoder's tensors under the names of the original code, as single-file checkpoints have them."""
    stages = 1 + max(int(name.split(".")[2]) for name in found if name.startswith("decoder.up_blocks."))

    def rename(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{stages - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{stages - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
        name = re.sub(r"to_([qkv])\.", r"\1.", name).replace("to_out.0", "proj_out")
        return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")

    return {rename(name): shape for name, shape in found.items()}
