"""Files that are not a KOALA U-Net: what they are, and which node loads them, by tensor names that only they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..architecture.detection import find_layout
from ..architecture.keys import Shape
from ..architecture.layout import KOALA_NAMES, SDXL, SSD_1B, VEGA, Layout
from .conventions import UNET_PREFIX


class Loader(NamedTuple):
    """What loads a file: a node by its display name (a stock one with its id, too), and the key of the folder."""

    node: str
    folder: str

    def __str__(self) -> str:
        return f"{self.node}, from models/{self.folder}"


LOAD_CHECKPOINT = Loader('the stock node "Load Checkpoint" (CheckpointLoaderSimple)', "checkpoints")
LOAD_UNET = Loader('the stock node "Load Diffusion Model" (UNETLoader)', "diffusion_models")
LOAD_CLIP = Loader('the stock node "Load CLIP" (CLIPLoader)', "text_encoders")
LOAD_LORA = Loader('KOALA LoRA Loader (one that is not for SDXL or KOALA: "Load LoRA", LoraLoader)', "loras")
LOAD_CONTROLNET = Loader(
    'KOALA ControlNet Loader (one that is not for SDXL: "Load ControlNet Model", ControlNetLoader)', "controlnet"
)
LOAD_PARTS = 'KOALA Checkpoint Loader, source "U-Net + text encoders + VAE"'
SWAP = ", and put KOALA U-Net Swap behind it"
"""What makes a KOALA of an SDXL graph."""

FAMILIES_BY_TEXT_WIDTH = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "the SDXL refiner",
    2048: "SDXL",
}
"""Width of the text context that a model's cross-attention takes -> the family of models."""


class OtherModel(NamedTuple):
    """Something that is not a KOALA U-Net: its name with an article, what loads it, and what else is to be done."""

    name: str
    loader: Loader
    then: str = ""

    @property
    def remedy(self) -> str:
        """What to do with the file, as a sentence."""
        return f"Load it with {self.loader}{self.then}."


# Searched from the top: a model that shares names with another stands before it.
_MODEL_SIGNATURES: tuple[tuple[OtherModel, tuple[str, ...]], ...] = (
    (
        OtherModel("a LoRA", LOAD_LORA),
        (
            *(".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", "_lora.down.", ".lora.down.", ".lora_linear_layer."),
            *(".hada_w1", ".lokr_w", ".oft_", "lora_unet_", "lora_te"),
        ),
    ),
    (
        OtherModel(
            "an IP-Adapter",
            Loader("the nodes of an IP-Adapter pack", "ipadapter"),
            ", and put KOALA Attention Patches behind them",
        ),
        ("ip_adapter.",),
    ),
    (OtherModel("a union ControlNet", LOAD_CONTROLNET), ("control_add_embedding.",)),
    (OtherModel("a Control-LoRA", LOAD_CONTROLNET), ("lora_controlnet",)),
    (
        OtherModel("a ControlNet", LOAD_CONTROLNET),
        (
            *("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_blocks.", "control_model."),
            *("input_hint_block.", "zero_convs."),
        ),
    ),
    (OtherModel("a T2I-Adapter", LOAD_CONTROLNET), ("adapter.body.", "body.0.resnets.0.", "body.0.block1.")),
    (
        OtherModel("a motion module", Loader("the nodes of an AnimateDiff pack", "animatediff_models")),
        ("motion_modules.", ".temporal_transformer."),
    ),
    (
        OtherModel(
            "a Stable Video Diffusion model",
            Loader('the stock node "Image Only Checkpoint Loader" (ImageOnlyCheckpointLoader)', "checkpoints"),
        ),
        (".time_stack.", ".temporal_transformer_blocks."),
    ),
    (OtherModel("a HunyuanVideo model", LOAD_UNET), ("token_refiner.",)),
    (OtherModel("an AuraFlow model", LOAD_UNET), ("double_layers.0.", "joint_transformer_blocks.0.")),
    (OtherModel("a Chroma model", LOAD_UNET), ("distilled_guidance_layer.",)),
    (OtherModel("a Flux model", LOAD_UNET), ("double_blocks.0.img_attn", "single_transformer_blocks.0.")),
    (OtherModel("a Stable Diffusion 3 model", LOAD_UNET), ("joint_blocks.0.", "transformer_blocks.0.norm1_context.")),
    (OtherModel("an LTX-Video model", LOAD_UNET), ("patchify_proj.",)),
    (OtherModel("a PixArt model", LOAD_UNET), ("adaln_single.", "t_block.1.")),
    (OtherModel("a Qwen-Image model", LOAD_UNET), ("transformer_blocks.0.img_mod.",)),
    (OtherModel("a Z-Image or Lumina model", LOAD_UNET), ("noise_refiner.0.",)),
    (OtherModel("a Wan model", LOAD_UNET), ("head.modulation", "condition_embedder.time_proj.")),
    (OtherModel("a Stable Cascade model", LOAD_UNET), ("clip_txt_mapper.", "clip_mapper.", ".channelwise.")),
)

_COMPONENT_SIGNATURES: tuple[tuple[OtherModel, tuple[str, ...]], ...] = (
    (
        OtherModel(
            "a CLIP vision model", Loader('the stock node "Load CLIP Vision" (CLIPVisionLoader)', "clip_vision")
        ),
        ("vision_model.", "embeddings.patch_embedding.", "visual.transformer."),
    ),
    (OtherModel("a T5 text encoder", LOAD_CLIP), ("encoder.block.0.layer.0.SelfAttention",)),
    (
        OtherModel("a CLIP text encoder", Loader(LOAD_PARTS, "text_encoders")),
        ("text_model.encoder.layers.", "encoder.layers.0.self_attn.", "transformer.resblocks.0."),
    ),
    (OtherModel("a language model, as some models use for text", LOAD_CLIP), ("model.layers.0.self_attn.",)),
    (OtherModel("a VAE", Loader(LOAD_PARTS, "vae")), ("decoder.conv_in.", "decoder.up_blocks.")),
    (
        OtherModel(
            "a textual inversion embedding",
            Loader("KOALA Prompt, mode comfy, by embedding:name in the prompt", "embeddings"),
        ),
        ("clip_g", "emb_params"),
    ),
)


def recognise(everything: Mapping[str, Shape], unet: Mapping[str, Shape]) -> OtherModel | None:
    """What a file is if it is not a KOALA U-Net; None where it may be one.

    Args:
        everything: shapes of all its tensors.
        unet: shapes of its U-Net's tensors, prefix taken off.
    """
    is_checkpoint = len(everything) > len(unet)
    if kind := _by_signature(_MODEL_SIGNATURES, everything):
        return kind._replace(loader=LOAD_CHECKPOINT) if is_checkpoint and kind.loader == LOAD_UNET else kind
    if _has_blocks(unet):
        return _other_unet(unet, LOAD_CHECKPOINT if is_checkpoint else LOAD_UNET)
    return _by_signature(_COMPONENT_SIGNATURES, everything)


def describe(everything: Mapping[str, Shape]) -> str:
    """A few words for any file, recognised or not; ``everything`` as for ``recognise``."""
    unet = {key.removeprefix(UNET_PREFIX): shape for key, shape in everything.items()}
    kind = recognise(everything, unet)
    if kind:
        return kind.name
    if _has_blocks(unet):
        read = find_layout(unet)
        if read is None:
            return "a U-Net of an unknown kind"
        return f"the U-Net of {KOALA_NAMES[read[0]]}" if read[0] in KOALA_NAMES else "an SDXL-family U-Net"
    first = ", ".join(sorted(everything)[:3]) or "none"
    return f"a file of an unknown kind ({len(everything)} tensors, first: {first})"


def _by_signature(
    table: tuple[tuple[OtherModel, tuple[str, ...]], ...], everything: Mapping[str, Shape]
) -> OtherModel | None:
    return next((kind for kind, names in table if any(part in key for key in everything for part in names)), None)


def _has_blocks(unet: Mapping[str, Shape]) -> bool:
    return any(key.startswith(("down_blocks.", "input_blocks.")) for key in unet)


def _other_unet(unet: Mapping[str, Shape], loader: Loader) -> OtherModel | None:
    """Name a U-Net of another family by its input channels, text width and layers."""
    channels = _width(unet.get("conv_in.weight", unet.get("input_blocks.0.0.weight")))
    context = next((_width(shape) for key, shape in unet.items() if key.endswith("attn2.to_k.weight")), None)
    added = any(key.startswith(("add_embedding.", "label_emb.")) for key in unet)
    if channels == 9:
        return OtherModel("an inpainting U-Net (9 input channels)", loader)
    if channels == 8:
        return OtherModel("an instruct-pix2pix U-Net (8 input channels)", loader)
    if context in (768, 1024) or (context == 1280 and added):
        family = FAMILIES_BY_TEXT_WIDTH[context]
        article = family if family.startswith("the ") else f"a {family} model"
        return OtherModel(f"{article} (text width {context})", loader)
    read = find_layout(unet)
    text = _SDXL_FAMILY.get(read[0]) if read else None
    return OtherModel(text, loader, SWAP if read and read[0] == SDXL else "") if text else None


def _width(shape: Shape | None) -> int | None:
    """Input channels of a weight; None where there is no such weight, or none of a convolution or linear layer."""
    return shape[1] if shape and len(shape) > 1 else None


_SDXL_FAMILY: dict[Layout, str] = {
    SDXL: "an SDXL base model (2,567M-parameter U-Net)",
    SSD_1B: "SSD-1B, another distilled SDXL",
    VEGA: "Segmind Vega, another distilled SDXL",
}
