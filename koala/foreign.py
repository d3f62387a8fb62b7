"""Files that are not a KOALA U-Net: what they are, and which stock node loads them. One table of telling names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .keys import Shape, read_layout
from .layout import SDXL, SSD_1B, VEGA, Layout

LOAD_CHECKPOINT = '"Load Checkpoint" (CheckpointLoaderSimple)'
LOAD_UNET = '"Load Diffusion Model" (UNETLoader)'


class Foreign(NamedTuple):
    """Something that is no KOALA U-Net: its name with an article, and the stock node that loads it."""

    name: str
    loader: str


_MARKS: tuple[tuple[Foreign, tuple[str, ...]], ...] = (
    (
        Foreign("a LoRA", '"Load LoRA" (LoraLoader)'),
        (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1", ".lokr_w", "lora_unet_", "lora_te", ".oft_"),
    ),
    (Foreign("an IP-Adapter", "of the IP-Adapter pack"), ("ip_adapter.",)),
    (
        Foreign("a ControlNet", '"Load ControlNet Model" (ControlNetLoader)'),
        ("controlnet_cond_embedding.", "controlnet_down_blocks.", "input_hint_block.", "control_model.", "zero_convs."),
    ),
    (
        Foreign("a T2I-Adapter", '"Load ControlNet Model" (ControlNetLoader)'),
        ("adapter.body.", "body.0.resnets.", "body.0.block1."),
    ),
    (Foreign("a Flux model", LOAD_UNET), ("double_blocks.0.img_attn", "single_transformer_blocks.0.")),
    (Foreign("a Stable Diffusion 3 model", LOAD_UNET), ("joint_blocks.0.", "joint_transformer_blocks.0.")),
    (Foreign("a PixArt model", LOAD_UNET), ("adaln_single.",)),
    (Foreign("a Qwen-Image model", LOAD_UNET), ("transformer_blocks.0.img_mod.",)),
    (Foreign("a Z-Image or Lumina model", LOAD_UNET), ("noise_refiner.0.",)),
    (Foreign("a motion module", "of the AnimateDiff pack"), ("motion_modules.", "temporal_transformer.")),
    (Foreign("a CLIP vision model", '"Load CLIP Vision" (CLIPVisionLoader)'), ("vision_model.",)),
)

_PARTS: tuple[tuple[Foreign, tuple[str, ...]], ...] = (
    (Foreign("a T5 text encoder", '"Load CLIP" (CLIPLoader)'), ("encoder.block.0.layer.0.SelfAttention",)),
    (
        Foreign("a CLIP text encoder", '"Load CLIP" (CLIPLoader)'),
        ("text_model.encoder.layers.", "encoder.layers.0.self_attn.", "transformer.resblocks.0."),
    ),
    (Foreign("a VAE", '"Load VAE" (VAELoader)'), ("decoder.conv_in.", "decoder.up_blocks.", "taesd_decoder.")),
    (Foreign("a textual inversion embedding", '"CLIP Text Encode", as embedding:name'), ("clip_g", "emb_params")),
)


def recognise(everything: Mapping[str, Shape], unet: Mapping[str, Shape]) -> Foreign | None:
    """What a file is if it is not a KOALA U-Net; None where it may be one.

    ``everything`` holds the shapes of all its tensors, ``unet`` those of its U-Net with the prefix taken off.
    """
    for kind, marks in _MARKS:
        if any(mark in key for key in everything for mark in marks):
            return kind
    if any(key.startswith(("down_blocks.", "input_blocks.")) for key in unet):
        return _other_unet(unet, LOAD_CHECKPOINT if len(everything) > len(unet) else LOAD_UNET)
    return next((kind for kind, marks in _PARTS if any(mark in key for key in everything for mark in marks)), None)


def describe(everything: Mapping[str, Shape]) -> str:
    """A few words for any file, recognised or not."""
    unet = {key.removeprefix("model.diffusion_model."): shape for key, shape in everything.items()}
    kind = recognise(everything, unet)
    if kind:
        return kind.name
    if any(key.startswith(("down_blocks.", "input_blocks.")) for key in unet):
        return "an SDXL-family U-Net"
    first = ", ".join(sorted(everything)[:3]) or "none"
    return f"a file of an unknown kind ({len(everything)} tensors, first: {first})"


def _other_unet(unet: Mapping[str, Shape], loader: str) -> Foreign | None:
    """Name a U-Net of another family by its input channels, text width and layers."""
    conv_in = unet.get("conv_in.weight", unet.get("input_blocks.0.0.weight"))
    context = next((shape[1] for key, shape in unet.items() if key.endswith("attn2.to_k.weight")), None)
    added = any(key.startswith(("add_embedding.", "label_emb.")) for key in unet)
    if conv_in and conv_in[1] == 9:
        return Foreign("an inpainting U-Net (9 input channels)", loader)
    if conv_in and conv_in[1] == 8:
        return Foreign("an instruct-pix2pix U-Net (8 input channels)", loader)
    if context == 768:
        return Foreign("a Stable Diffusion 1.x model (text width 768)", loader)
    if context == 1024:
        return Foreign("a Stable Diffusion 2.x model (text width 1024)", loader)
    if context == 1280 and added:
        return Foreign("the SDXL refiner (text width 1280)", loader)
    return next((Foreign(text, loader) for layout, text in _SDXL_FAMILY.items() if layout == _layout(unet)), None)


_SDXL_FAMILY: dict[Layout, str] = {
    SDXL: "an SDXL base model (2,567M-parameter U-Net)",
    SSD_1B: "SSD-1B, another distilled SDXL",
    VEGA: "Segmind Vega, another distilled SDXL",
}


def _layout(unet: Mapping[str, Shape]) -> Layout | None:
    try:
        return read_layout(unet)[0]
    except (KeyError, ValueError, IndexError):
        return None
