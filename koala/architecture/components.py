"""The models beside the U-Net: sizes of text encoders and autoencoder read from tensor shapes, and their names.

Text encoders may come from transformers 4 (``text_model.`` prefix), transformers 5 (no prefix) or as SDXL single-file
checkpoints store them; the autoencoder under diffusers or original names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .keys import Shape
from .layout import HEAD_WIDTH

PROMPT_TOKENS = 77
"""Length of a tokenised prompt, begin and end included; both encoders have as many positions."""
LATENT_SCALE = 0.13025
"""SDXL's: the U-Net's latents are the VAE's, times this."""

TEXT_TENSORS = (
    "embeddings.position_embedding.weight",
    "embeddings.token_embedding.weight",
    "final_layer_norm.weight",
    "final_layer_norm.bias",
)
TEXT_LAYER_TENSORS = tuple(
    f"{module}.{kind}"
    for module in (
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        "self_attn.k_proj",
        "self_attn.out_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    )
    for kind in ("weight", "bias")
)


@dataclass(frozen=True)
class TextEncoder:
    """Sizes of a CLIP text encoder, all but the number of heads read from its tensors.

    SDXL's encoders have heads of 64 channels; an encoder narrower than that has one head.
    """

    hidden: int
    intermediate: int
    layers: int
    projection: int | None

    @property
    def heads(self) -> int:
        return max(1, self.hidden // HEAD_WIDTH)


def text_name(name: str) -> str:
    """A text encoder tensor's name as transformers 4 writes it, whichever version wrote the file."""
    if name.startswith(("text_model.", "text_projection", "logit_scale")):
        return name
    return f"text_model.{name}"


def read_text_encoder(found: Mapping[str, Shape]) -> TextEncoder:
    """Read an encoder's sizes from transformers names (either version).

    Raises KeyError with the name of the first tensor that is missing.
    """
    shapes = {text_name(name): shape for name, shape in found.items()}
    prefix = "text_model.encoder.layers."
    layers = _count(shapes, prefix)
    if not layers:
        raise KeyError(f"{prefix}0.layer_norm1.weight")
    inner = (f"encoder.layers.{index}.{tensor}" for index in range(layers) for tensor in TEXT_LAYER_TENSORS)
    for name in (*TEXT_TENSORS, *inner):
        if f"text_model.{name}" not in shapes:
            raise KeyError(f"text_model.{name}")
    projection = shapes.get("text_projection.weight")
    return TextEncoder(
        hidden=_size(shapes, "text_model.embeddings.token_embedding.weight", 1),
        intermediate=_size(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0),
        layers=layers,
        projection=projection[0] if projection else None,
    )


@dataclass(frozen=True)
class Autoencoder:
    """Sizes of an AutoencoderKL: channels of each stage, residual layers a stage of the encoder, latent channels."""

    channels: tuple[int, ...]
    layers: int
    latent_channels: int
    embed: int
    image_channels: int


def read_autoencoder(found: Mapping[str, Shape]) -> Autoencoder:
    """Read an autoencoder's sizes from diffusers or original names.

    Raises KeyError with the name of a tensor that is missing.
    """
    diffusers = any(name.startswith("encoder.down_blocks.") for name in found)
    stage, layer = ("encoder.down_blocks.", ".resnets.") if diffusers else ("encoder.down.", ".block.")
    stages = _count(found, stage)
    if not stages:
        raise KeyError("encoder.down.0.block.0.conv1.weight")
    return Autoencoder(
        channels=tuple(_size(found, f"{stage}{index}{layer}0.conv1.weight", 0) for index in range(stages)),
        layers=_count(found, f"{stage}0{layer}"),
        latent_channels=_size(found, "decoder.conv_in.weight", 1),
        embed=_size(found, "post_quant_conv.weight", 1),
        image_channels=_size(found, "encoder.conv_in.weight", 1),
    )


def _size(found: Mapping[str, Shape], name: str, axis: int) -> int:
    """One dimension of a tensor; a tensor that lacks it is as good as missing."""
    if len(found[name]) <= axis:
        raise KeyError(name)
    return found[name][axis]


def _count(found: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".", 1)[0] for name in found if name.startswith(prefix)})
