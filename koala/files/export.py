"""What is written with a model: ModelSpec metadata, and the configurations of a diffusers folder.

A folder is what ``StableDiffusionXLPipeline.save_pretrained`` makes of the published models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from ..architecture.components import LATENT_SCALE, PROMPT_TOKENS, Autoencoder, TextEncoder
from ..architecture.layout import Layout, name
from ..model_info import ModelFacts
from ..releases import SCHEDULER_CONFIG, VARIANT_KEY, VARIANTS
from .config import SETTINGS_RULES
from .conventions import KEPT_TRANSFORMERS_KEY, SCHEDULER_KEY, SETTINGS_KEY

TEXT_MODELS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
TOKENIZER_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
TOKENIZER_PADDING = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
"""Folder of each tokenizer -> the word that fills up a prompt."""
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
    """Metadata of a weights file: ModelSpec 1.0.1's fields, and what the pack reads back.

    That is the variant and the kept transformer blocks where they are known, the settings where they are not the
    variant's, and the schedule where it is not SDXL's.

    Args:
        facts: of the model.
        title: its name.
        implementation: whose tensor names the file has: "sgm" for ComfyUI's, "diffusers" for diffusers'.
    """
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
        found[VARIANT_KEY] = facts.identity.variant.name
    if facts.settings != VARIANTS[facts.identity.variant.name].settings:
        asked = {key: value for key, value in asdict(facts.settings).items() if key in SETTINGS_RULES}
        found[SETTINGS_KEY] = json.dumps(asked)
    if facts.kept_transformers:
        found[KEPT_TRANSFORMERS_KEY] = json.dumps(dict(facts.kept_transformers))
    if dict(facts.scheduler) != dict(SCHEDULER_CONFIG):
        found[SCHEDULER_KEY] = json.dumps(dict(facts.scheduler))
    return found


def scheduler_config(facts: ModelFacts) -> dict[str, object]:
    """scheduler/scheduler_config.json."""
    return {**facts.scheduler, "_class_name": "EulerDiscreteScheduler"}


def unet_config(layout: Layout, side: int = 1024) -> dict[str, object]:
    """diffusers' ``UNet2DConditionModel`` arguments for a layout; ``side`` is the picture's, in pixels.

    Raises ValueError for a layout that these cannot describe: one whose layers differ within a stage, or whose up
    blocks do not mirror its down blocks.
    """
    depths = [stage[0] for stage in layout.down]
    layers = len(layout.down[0])
    mirrored = layout.down == tuple((depth,) * layers for depth in depths) and layout.up == tuple(
        (depth,) * (layers + 1) for depth in reversed(depths)
    )
    if not mirrored or layout.middle not in (None, depths[-1]):
        raise ValueError(
            f"diffusers' configuration cannot describe the {name(layout)}: expected the same layers within a stage, "
            f"and in its down and up blocks. Save it as a checkpoint."
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
    """config.json of ``text_encoder`` or ``text_encoder_2``; CLIP's own vocabulary of 49408 words."""
    return {
        "architectures": [TEXT_MODELS[part]],
        "model_type": "clip_text_model",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "projection_dim": size.projection or size.hidden,
        "hidden_act": "quick_gelu" if part == "text_encoder" else "gelu",
        "max_position_embeddings": size.positions,
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


def read_vocabulary(folder: Path) -> dict[str, bytes]:
    """CLIP's tokenizer files in a folder, as ``write.write_folder`` takes them. Raises OSError where one is absent."""
    return {file: (folder / file).read_bytes() for file in TOKENIZER_FILES}


def tokenizers(vocabulary: Mapping[str, bytes]) -> dict[str, bytes]:
    """Path in the folder -> contents, of both tokenizers' files."""
    return {
        f"{part}/{file}": content
        for part, padding in TOKENIZER_PADDING.items()
        for file, content in tokenizer_files(vocabulary, padding).items()
    }


def tokenizer_files(files: Mapping[str, bytes], padding: str) -> dict[str, bytes]:
    """CLIP's vocabulary files for one of SDXL's two tokenizers, which differ only in the word that fills up a prompt:
    "<|endoftext|>" for the first, "!" for the second."""
    settings = {
        "tokenizer_config.json": {"pad_token": padding, "model_max_length": PROMPT_TOKENS},
        "special_tokens_map.json": {"pad_token": padding},
    }
    return {
        file: as_json(json.loads(text) | settings[file]) if file in settings else text for file, text in files.items()
    }


def as_json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
