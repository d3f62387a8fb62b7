"""Full-size models with random weights, laid out as published: for tests that need the size, not the meaning.

KOALA folders, an SDXL checkpoint, and adapters for SDXL. They are in the cache beside the test host, 11 GB in all,
and made once in about two minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from koala_sdxl.koala.architecture.component_keys import text_name
from koala_sdxl.koala.architecture.components import LATENT_SCALE
from koala_sdxl.koala.architecture.keys import Shape, shapes_of, tensors
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, SDXL, Layout
from koala_sdxl.koala.files.atomic_write import written_whole
from koala_sdxl.koala.files.conventions import CLIP_PREFIXES, UNET_PREFIX, VAE_PREFIX
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from tools.harness import testhost
from tools.synthetic import adapters

LAYOUTS: dict[str, Layout] = {"koala-700m": KOALA_700M, "koala-1b": KOALA_1B}
NARROW = (320, 320, 320)
"""Widths at which core still takes a U-Net of SDXL's layers for SDXL's, with a ninth of the weights."""
GAIN = 0.7  # keeps activations of a random network near 1

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": LATENT_SCALE,
    "force_upcast": False,
}


def folder(name: str) -> Path:
    """The folder of a released model's name ("koala-700m", "koala-1b"), made on the first call.

    Text encoders and VAE are the same in every release, here too: they are made once and linked.
    """
    layout, shared = LAYOUTS[name], _once("sdxl-parts", _write_shared)

    def write(root: Path) -> None:
        _save(unet_state(layout), root / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        for part in sorted(shared.iterdir()):
            (root / part.name).symlink_to(part, target_is_directory=True)
        _save_json(dict(SCHEDULER_CONFIG), root / "scheduler" / "scheduler_config.json")
        _save_json({"_class_name": "StableDiffusionXLPipeline"}, root / "model_index.json")

    return _once(name, write)


def sdxl_checkpoint(layout: Layout = SDXL) -> Path:
    """SDXL, or a narrow one, in one file as it is published, its U-Net in fp8 to be no larger than it must."""
    shared = _once("sdxl-parts", _write_shared)

    def write(root: Path) -> None:
        named = {UNET_PREFIX + tensor.comfy: tensor.shape for tensor in tensors(layout)}
        state = {name: weights.to(torch.float8_e4m3fn) for name, weights in _random(named, 3)}
        for part, prefix in (
            ("text_encoder/model.fp16", f"{CLIP_PREFIXES[0]}transformer."),
            ("text_encoder_2/model.fp16", f"{CLIP_PREFIXES[1]}model.transformer."),
            ("vae/diffusion_pytorch_model", VAE_PREFIX),
        ):
            weights = load_file(shared / f"{part}.safetensors")
            state |= {prefix + (text_name(name) if "text" in part else name): weights[name] for name in weights}
        _save(state, root / "sd_xl_base_1.0.safetensors")

    return _once(_named("sdxl-checkpoint", layout), write) / "sd_xl_base_1.0.safetensors"


def sdxl_lora(layout: Layout = SDXL) -> Path:
    """A LoRA for it, as kohya's tools write it, on every matrix of the attention modules."""

    def write(root: Path) -> None:
        state = adapters.lora(layout, only=adapters.in_attention)
        _save({name: tensor.half() for name, tensor in state.items()}, root / "lora.safetensors")

    return _once(_named("sdxl-lora", layout), write) / "lora.safetensors"


def narrow(layout: Layout) -> Layout:
    """The same layers in ``NARROW`` widths."""
    return replace(layout, channels=NARROW)


def narrow_unet(name: str) -> Path:
    """The U-Net of a released model's layers in those widths."""

    def write(root: Path) -> None:
        _save(unet_state(narrow(LAYOUTS[name])), root / "unet.safetensors")

    return _once(f"narrow-{name}", write) / "unet.safetensors"


def _named(name: str, layout: Layout) -> str:
    return f"narrow-{name}" if layout.channels == NARROW else name


def sdxl_controlnet() -> Path:
    """An SDXL ControlNet of the middle size, with two transformers instead of thirty-four, as diffusers saves it."""

    def write(root: Path) -> None:
        state = adapters.controlnet(adapters.shallow(SDXL), numbering="diffusers")
        _save({name: tensor.half() for name, tensor in state.items()}, root / "controlnet.safetensors")

    return _once("sdxl-controlnet", write) / "controlnet.safetensors"


def unet_state(layout: Layout, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp16 weights of a U-Net under its diffusers names."""
    return dict(_random({tensor.diffusers: tensor.shape for tensor in tensors(layout)}, seed))


def _once(name: str, write: Callable[[Path], None]) -> Path:
    """The cached folder of that name; made aside and renamed, so that an incomplete folder is never used."""
    target = testhost.cache_folder() / "random-weights-2" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as aside:
            write(aside)
    return target


def _write_shared(root: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        first = CLIPTextModel(CLIPTextConfig(**CLIP_L, projection_dim=768, hidden_act="quick_gelu"))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280, hidden_act="gelu"))
        vae = AutoencoderKL(**VAE)
    for part, model in (("text_encoder", first), ("text_encoder_2", second)):
        _save(dict(_random(_shapes(model), 1)), root / part / "model.fp16.safetensors")
    _save(dict(_random(_shapes(vae), 2)), root / "vae" / "diffusion_pytorch_model.safetensors")


def _shapes(model: torch.nn.Module) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes_of(model.state_dict()).items() if not name.endswith("_ids")}


def _random(shapes: Mapping[str, Shape], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Norm weights 1, biases 0, all else normal with a deviation that keeps the signal's size; fp16."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if name.endswith("bias"):
            yield name, torch.zeros(shape, dtype=torch.float16)
        elif len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.float16)
        else:
            fan_in = shape[1] if "embedding" in name else int(torch.tensor(shape[1:]).prod())
            weights = torch.empty(shape).normal_(0, GAIN / fan_in**0.5, generator=generator)
            yield name, weights.half()


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def _save_json(content: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
