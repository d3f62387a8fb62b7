"""What a saved model says of itself: ModelSpec metadata, and the configurations of a diffusers folder.

A folder is what ``StableDiffusionXLPipeline.save_pretrained`` makes of the published models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone

from ..architecture.components import Autoencoder, TextEncoder
from ..architecture.layout import Layout, name
from ..model_info import ModelFacts
from ..releases import SCHEDULER_CONFIG
from .conventions import KEPT_KEY, SCHEDULER_KEY

LATENT_SCALE = 0.13025  # SDXL's
TEXT_MODELS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    **{part: ["transformers", kind] for part, kind in TEXT_MODELS.items()},
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""model_index.json: the pipeline's class and those of its parts."""


def metadata(facts: ModelFacts, title: str, implementation: str) -> dict[str, str]:
    """ModelSpec 1.0.1's fields, and what the pack reads back: the variant and the kept transformer blocks where they
    are known, the schedule where it is not SDXL's. ``implementation``: "sgm" for ComfyUI's names, "diffusers" for
    diffusers'."""
    found = {
        "format": "pt",  # transformers refuses a file without
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{facts.side}x{facts.side}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.predict_key": "epsilon",
    }
    if facts.identity.certain:
        found["koala.variant"] = facts.identity.variant.name
    if facts.kept:
        found[KEPT_KEY] = json.dumps(dict(facts.kept))
    if dict(facts.scheduler) != dict(SCHEDULER_CONFIG):
        found[SCHEDULER_KEY] = json.dumps(dict(facts.scheduler))
    return found


def scheduler_config(facts: ModelFacts) -> dict[str, object]:
    """scheduler/scheduler_config.json."""
    return {**facts.scheduler, "_class_name": "EulerDiscreteScheduler"}


def unet_config(layout: Layout, side: int = 1024) -> dict[str, object]:
    """diffusers' ``UNet2DConditionModel`` arguments for a layout; ``side`` is the picture's, in pixels.

    Raises ValueError for a layout that these cannot say: one whose layers differ within a stage, or whose way up does
    not mirror its way down.
    """
    depths = [stage[0] for stage in layout.down]
    layers = len(layout.down[0])
    mirrored = layout.down == tuple((depth,) * layers for depth in depths) and layout.up == tuple(
        (depth,) * (layers + 1) for depth in reversed(depths)
    )
    if not mirrored or layout.middle not in (None, depths[-1]):
        raise ValueError(
            f"diffusers' configuration cannot describe the {name(layout)}: expected layers alike within a stage, and "
            f"alike on the way down and up. Save it as a checkpoint."
        )
    cross = [depth > 0 for depth in depths]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": side // 8,
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "block_out_channels": list(layout.channels),
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(cross)],
        "mid_block_type": None if layout.middle is None else "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": [max(1, depth) for depth in depths],
        # diffusers calls the number of heads so
        "attention_head_dim": [max(1, width // 64) for width in layout.channels],
        "cross_attention_dim": layout.context,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": layout.added,
    }


def text_config(part: str, size: TextEncoder) -> dict[str, object]:
    """config.json of ``text_encoder`` or ``text_encoder_2``; CLIP's own vocabulary of 49408 words, 77 places."""
    return {
        "architectures": [TEXT_MODELS[part]],
        "model_type": "clip_text_model",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "projection_dim": size.projection or size.hidden,
        "hidden_act": "quick_gelu" if part == "text_encoder" else "gelu",
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }


def vae_config(size: Autoencoder, side: int) -> dict[str, object]:
    """vae/config.json."""
    stages = len(size.channels)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": side,
        "in_channels": size.image_channels,
        "out_channels": size.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "block_out_channels": list(size.channels),
        "layers_per_block": size.layers,
        "latent_channels": size.latent_channels,
        "scaling_factor": LATENT_SCALE,
        "force_upcast": True,  # SDXL's own VAE overflows in fp16
    }


def tokenizer_files(files: Mapping[str, bytes], padding: str) -> dict[str, bytes]:
    """CLIP's vocabulary files for one of SDXL's two tokenizers, which differ only in the word that fills up a prompt:
    "<|endoftext|>" for the first, "!" for the second."""
    settings = {
        "tokenizer_config.json": {"pad_token": padding, "model_max_length": 77},
        "special_tokens_map.json": {"pad_token": padding},
    }
    return {
        file: as_json(json.loads(text) | settings[file]) if file in settings else text for file, text in files.items()
    }


def as_json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


_VAE_NAMES = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def vae_name(original: str, stages: int) -> str:
    """An autoencoder tensor's diffusers name from its original one; diffusers counts the way up from its beginning.

    The middle attention's four matrices are convolutions of (width, width, 1, 1) under the original names, and
    (width, width) under diffusers'.
    """
    found = original
    for pattern, name_ in _VAE_NAMES:
        found = re.sub(pattern, name_, found)
    return re.sub(r"^decoder\.up_blocks\.(\d+)", lambda stage: f"decoder.up_blocks.{stages - 1 - int(stage[1])}", found)
