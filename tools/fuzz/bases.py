"""One small whole file of every kind that the pack reads, and what loads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from koala_sdxl import koala_loader
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.keys import Numbering, shapes_of, tensors
from koala_sdxl.koala.architecture.layout import KOALA_TINY, Layout
from koala_sdxl.koala.files import convert
from koala_sdxl.koala.files.conventions import CLIP_PREFIXES, FOLDER_PARTS, UNET_PREFIX, VAE_PREFIX
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from koala_sdxl.nodes.load import load_parts
from tools.fuzz.files import Weights
from tools.synthetic import adapters

State = dict[str, torch.Tensor]
CLIP_L = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 3}
CLIP_G = {"hidden_size": 8, "intermediate_size": 24, "num_attention_heads": 1, "num_hidden_layers": 3}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
}
UNET = Layout(
    channels=(32, 64, 64),
    down=((0,), (1,), (1,)),
    middle=None,
    up=((1, 1), (1, 1), (0, 0)),
    context=CLIP_L["hidden_size"] + CLIP_G["hidden_size"],
    added=CLIP_G["hidden_size"] + 6 * 256,
)
"""KOALA-700M's layers with one transformer block each: a megabyte and a half."""


@dataclass(frozen=True)
class Base:
    """A whole file, or a folder of files, as a case begins."""

    name: str
    kind: str
    """What the figures are counted by."""
    load: Callable[[Path], Any]
    """Loads it as the pack's nodes do; takes the file's or the folder's path."""
    weights: Mapping[str, Weights]
    """Path below the case's folder -> weights. One with the path "" is a file of its own."""
    configs: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Path below the case's folder -> JSON file."""
    own: tuple[str, ...] = ("",)
    """Beginnings of the names of the loaded tensors that are this file's; others come from undamaged files."""
    is_lora: bool = False


def bases() -> Iterator[Base]:
    """Every kind, each built once."""
    parts = _parts()
    for numbering in ("comfy", "script"):
        whole = Weights.of(_checkpoint(numbering))
        yield Base(f"checkpoint, {numbering}", "checkpoint", koala_loader.load_checkpoint, {"": whole})
    yield Base("checkpoint for its parts", "checkpoint", koala_loader.load_checkpoint_parts, {"": whole})
    yield Base("bare U-Net", "U-Net", _load_unet, {"": Weights.of(parts["unet"])})
    for part, own in (("text_encoder", "clip_l."), ("text_encoder_2", "clip_g.")):
        yield Base(part, "text encoder", _beside(part), {"": Weights.of(parts[part])}, own=(own,))
    for names, vae in (("diffusers", parts["vae"]), ("original", convert.original_vae(parts["vae"], 4))):
        own_vae = ("encoder.", "decoder.", "quant_", "post_quant_")
        yield Base(f"VAE, {names}", "VAE", _beside("vae"), {"": Weights.of(vae)}, own=own_vae)
    files = {f"{part}/{names[1]}": Weights.of(parts[part]) for part, names in FOLDER_PARTS.items()}
    configs: dict[str, dict[str, object]] = {
        "model_index.json": {"_class_name": "StableDiffusionXLPipeline"},
        "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler", **SCHEDULER_CONFIG},
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "_name_or_path": "etri-vilab/koala-700m"},
    }
    yield Base("folder", "folder", koala_loader.load_folder, files, configs)
    yield from _loras()


def _loras() -> Iterator[Base]:
    """Every kind in kohya's names, a plain LoRA in every naming, one trained on KOALA, one with text encoders."""
    sdxl = adapters.SMALL_SDXL
    ways = [(kind, "kohya, LDM blocks") for kind in adapters.KINDS]
    ways += [("LoRA", naming) for naming in adapters.NAMINGS] + [("DoRA", "PEFT"), ("DoRA", "diffusers, PEFT")]
    for kind, naming in dict.fromkeys(ways):
        yield _lora(f"LoRA file, {kind}, {naming}", adapters.lora(sdxl, kind, naming, only=_some))
    yield _lora("LoRA file, KOALA's own", adapters.lora(KOALA_TINY, only=adapters.in_attention))
    plain = adapters.lora(sdxl, "LoRA", "diffusers, PEFT", only=_some)
    plain = {key: tensor for key, tensor in plain.items() if not key.endswith(".alpha")}
    for place, rslora in enumerate((False, True)):
        stated = {"unet.r": adapters.RANK, "unet.lora_alpha": 3.0 + place, "unet.use_rslora": rslora}
        name = f"LoRA file, diffusers, PEFT, strength in the header{', rsLoRA' if rslora else ''}"
        yield _lora(name, plain, {"lora_adapter_metadata": json.dumps(stated)})
    text = adapters.text_lora(1, 32, 128) | adapters.text_lora(1, 64, 256, "lora_te2")
    yield _lora("LoRA file, with text encoders", adapters.lora(sdxl, only=_some) | text)


def _some(tensor: Any) -> bool:
    """A few modules of each sort, among them some that KOALA lacks."""
    places = ("attentions.0.transformer_blocks.0.", "attentions.0.transformer_blocks.7.", "attentions.0.proj")
    return tensor.diffusers.startswith(("down_blocks.2", "up_blocks.0")) and any(
        place in tensor.diffusers for place in (*places, "resnets.0.", "resnets.1.conv1")
    )


def _lora(name: str, state: State, metadata: Mapping[str, str] | None = None) -> Base:
    alphas = [key for key in state if key.endswith(".alpha")]
    for place, key in enumerate(alphas):  # each its own: which one a patch has can be told
        state[key] = torch.tensor(1.0 + place / 256)
    return Base(name, "LoRA", _load_lora, {"": Weights.of(state, metadata)}, is_lora=True)


def _load_lora(path: Path) -> Any:
    model, clip = lora_target()
    return apply_lora(model, clip, path, 1.0, 1.0)


@cache
def lora_target() -> tuple[Any, Any]:
    """MODEL and CLIP that LoRAs are applied to: koala-tiny's."""
    return koala_loader.load_checkpoint(koala_loader.BUILT_IN)[:2]


def _load_unet(path: Path) -> Any:
    return (koala_loader.load_unet(inspect_model(path), path.name),)


def _beside(part: str) -> Callable[[Path], Any]:
    """Loads a text encoder or VAE with undamaged ones beside it, as the loader node does."""

    def load(path: Path) -> Any:
        beside = path.parent / "beside"
        if not beside.is_dir():
            beside.mkdir()
            for name in ("text_encoder", "text_encoder_2", "vae"):
                (beside / f"{name}.safetensors").write_bytes(Weights.of(_parts()[name]).content())
        chosen = {name: beside / f"{name}.safetensors" for name in ("text_encoder", "text_encoder_2", "vae")}
        return load_parts(UNET, *(chosen | {part: path}).values())

    return load


@cache
def _parts() -> dict[str, State]:
    """The folder's four models, diffusers' and transformers' names, every weight another."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        models = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L, projection_dim=8)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=8)),
            "vae": AutoencoderKL(**VAE),
        }
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "unet": {tensor.diffusers: tensor.shape for tensor in tensors(UNET)}
    }
    for name, model in models.items():
        named = shapes_of(model.state_dict())
        if "text" in name:  # transformers 5 leaves the prefix out
            named = {key if "text_" in key else f"text_model.{key}": shape for key, shape in named.items()}
        shapes[name] = {key: shape for key, shape in named.items() if not key.endswith("_ids")}
    generator = torch.Generator().manual_seed(0)
    return {
        name: {key: torch.randn(shape, generator=generator).half() for key, shape in found.items()}
        for name, found in shapes.items()
    }


def _checkpoint(numbering: Numbering) -> State:
    parts = _parts()
    named = {tensor.diffusers: getattr(tensor, numbering) for tensor in tensors(UNET)}
    state = {UNET_PREFIX + named[key]: values for key, values in parts["unet"].items()}
    for prefix, part in (
        (CLIP_PREFIXES[0], convert.clip_l_for_checkpoint(parts["text_encoder"])),
        (CLIP_PREFIXES[1], convert.clip_g_for_checkpoint(parts["text_encoder_2"])),
        (VAE_PREFIX, convert.original_vae(parts["vae"], 4)),
    ):
        state |= {prefix + key: values for key, values in part.items()}
    return state


def write(base: Base, contents: Mapping[str, bytes], folder: Path, name: str) -> Path:
    """Put a case onto the disk; returns what its loader takes."""
    target = folder / (f"{name}.safetensors" if "" in base.weights else name)
    for path, content in contents.items():
        place = target / path if path else target
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return target


def contents(base: Base) -> dict[str, bytes]:
    """Every file of an undamaged base."""
    files = {path: weights.content() for path, weights in base.weights.items()}
    return files | {path: json.dumps(config, indent=2).encode() for path, config in base.configs.items()}
