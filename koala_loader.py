"""Weights on disk -> ComfyUI MODEL, CLIP and VAE. The only file that builds the host's models.

Each part is read from a ``Source`` (a file and a name prefix) by a top-level function, so that the host can build a
part again from its file when it needs a second copy (dynamic VRAM, torch.compile, multi-GPU: ``cached_patcher_init``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch

from .koala import checkpoint, keys, layout, parts
from .koala.checkpoint import CLIP_PREFIXES, VAE_PREFIX
from .koala.facts import ModelFacts, assumed_facts, facts_of
from .koala.layout import Layout

BUILT_IN = Path(__file__).parent / "assets" / "koala-tiny.safetensors"
ATTACHMENT = "koala"
WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
"""Types in which the U-Net's weights can be kept; None leaves the choice to the host (by file and device)."""

Loaded = tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]


class Source(NamedTuple):
    """Where one part's tensors lie: a file, and the prefix of their names in it."""

    path: Path
    prefix: str = ""


def load_folder(folder: Path, weight_dtype: str = "default") -> Loaded:
    """Load a Hugging Face folder. Raises checkpoint.CheckpointError for anything that is no whole KOALA folder."""
    found = checkpoint.inspect_folder(folder)
    return (
        load_unet(found.model, folder.name, weight_dtype),
        load_clip(Source(found.text_encoder), Source(found.text_encoder_2)),
        load_vae(Source(found.vae)),
    )


def load_checkpoint(path: Path, weight_dtype: str = "default") -> Loaded:
    """Load a single-file checkpoint, ComfyUI's numbering or diffusers' conversion script's."""
    model = checkpoint.inspect_checkpoint(path)
    return (load_unet(model, path.name, weight_dtype), *load_checkpoint_parts(path))


def load_checkpoint_parts(path: Path) -> tuple[comfy.sd.CLIP, comfy.sd.VAE]:
    """CLIP and VAE of any single-file checkpoint of the SDXL family; its U-Net is not read."""
    checkpoint.require_checkpoint_parts(path)
    first, second = (Source(path, prefix) for prefix in CLIP_PREFIXES)
    return load_clip(first, second), load_vae(Source(path, VAE_PREFIX))


def load_unet(model: checkpoint.Model, source: str, weight_dtype: str = "default") -> comfy.model_patcher.ModelPatcher:
    """Build the MODEL of an inspected U-Net; what is known of it (``ModelFacts``) travels with it as an attachment."""
    patcher = _unet_patcher(model.unet, WEIGHT_DTYPES[weight_dtype])
    patcher.set_attachments(ATTACHMENT, facts_of(model, source))
    return patcher


def model_facts(model: comfy.model_patcher.ModelPatcher) -> ModelFacts:
    """The facts attached to a MODEL, or those that can be seen on a KOALA that another node loaded.

    Raises ValueError for a MODEL that is no KOALA.
    """
    attached = model.get_attachment(ATTACHMENT)
    if attached is not None:
        return attached
    seen = network_layout(getattr(model.model, "diffusion_model", None))
    if seen not in layout.KOALA_NAMES:
        raise ValueError(
            f"this MODEL is no KOALA ({type(model.model).__name__}); expected a model from KOALA Checkpoint Loader, or "
            f"a KOALA U-Net from a stock loader. For other models use the stock nodes, or the preset custom."
        )
    return assumed_facts(seen, dtype_name(model.model_dtype()), model.model_size())


def network_layout(network: torch.nn.Module | None) -> Layout | None:
    """The layout of a host model's U-Net, None for anything that is not of SDXL's family."""
    try:
        return keys.read_layout(_shapes(network.state_dict() if network is not None else {}))[0]
    except (KeyError, ValueError, IndexError):
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """A weight type's name as the loader's choices have it."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(
        dtype, str(dtype).removeprefix("torch.").replace("float8", "fp8")
    )


def unet_config(shape: Layout) -> dict[str, Any]:
    """ComfyUI's ``UNetModel`` settings for a layout, as its model detection would write them."""
    return {
        "image_size": 32,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "model_channels": shape.channels[0],
        "channel_mult": [width // shape.channels[0] for width in shape.channels],
        "num_res_blocks": [len(stage) for stage in shape.down],
        "transformer_depth": [depth for stage in shape.down for depth in stage],
        # ComfyUI takes these from the end, deepest stage first
        "transformer_depth_output": [depth for stage in reversed(shape.up) for depth in reversed(stage)],
        "transformer_depth_middle": {None: -2, 0: -1}.get(shape.middle, shape.middle),
        "context_dim": shape.context,
        "adm_in_channels": shape.added,
        "num_classes": "sequential",
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "legacy": False,
    }


def _unet_patcher(
    unet: checkpoint.UNetFile, dtype: torch.dtype | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Build core's SDXL model for any layout and fill it, as ``comfy.sd.load_diffusion_model`` does for known ones."""
    weights = _read(Source(unet.path, unet.prefix))
    names = keys.renaming(unet.layout, unet.numbering, "comfy")
    weights = {names[name]: tensor for name, tensor in weights.items()}
    management = comfy.model_management
    device, offload_device = management.get_torch_device(), management.unet_offload_device()
    config = comfy.supported_models.SDXL(unet_config(unet.layout))
    kept = dtype or management.unet_dtype(
        model_params=keys.parameters(unet.layout),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    cast = management.unet_manual_cast(kept, device, config.supported_inference_dtypes)
    config.set_inference_dtype(kept, cast)
    model = config.get_model(weights, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (_unet_patcher, (unet, dtype))
    return patcher


def load_clip(first: Source, second: Source, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Build SDXL's CLIP from two text encoders of any size; ``first`` is CLIP-L, ``second`` CLIP-G."""
    encoders = {"clip_l": _read_text(first), "clip_g": _read_text(second)}
    sizes = {name: parts.read_text_encoder(_shapes(weights)) for name, weights in encoders.items()}
    state = {
        f"{name}.transformer.{key}": tensor for name, weights in encoders.items() for key, tensor in weights.items()
    }
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=_embeddings(),
        parameters=sum(tensor.numel() for tensor in state.values()),
        state_dict=state,
        model_options={f"{name}_model_config": _text_config(size) for name, size in sizes.items()},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_clip_patcher, (first, second))
    return clip


def load_vae(source: Source, disable_dynamic: bool = False) -> comfy.sd.VAE:
    """Build an AutoencoderKL of any size from diffusers or original names."""
    weights = _read(source)
    sizes = parts.read_autoencoder(_shapes(weights))
    first = sizes.channels[0]
    config = {
        "ddconfig": {
            "double_z": True,
            "z_channels": sizes.latent_channels,
            "resolution": 256,
            "in_channels": sizes.image_channels,
            "out_ch": sizes.image_channels,
            "ch": first,
            "ch_mult": [width // first for width in sizes.channels],
            "num_res_blocks": sizes.layers,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "embed_dim": sizes.embed,
    }
    vae = comfy.sd.VAE(sd=weights, config={"params": config})
    vae.patcher.cached_patcher_init = (_vae_patcher, (source,))
    return vae


def _clip_patcher(first: Source, second: Source, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_clip(first, second, disable_dynamic).patcher


def _vae_patcher(source: Source, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_vae(source).patcher


def _read(source: Source) -> dict[str, torch.Tensor]:
    """A part's tensors by their names without the prefix; memory-mapped, never to be written to."""
    weights = comfy.utils.load_torch_file(str(source.path))
    return {name[len(source.prefix) :]: tensor for name, tensor in weights.items() if name.startswith(source.prefix)}


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, keys.Shape]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _read_text(source: Source) -> dict[str, torch.Tensor]:
    """A text encoder's tensors under transformers' names, wherever they lie."""
    weights = _read(source)
    if source.prefix == CLIP_PREFIXES[1]:  # open_clip's names
        weights = {key.removeprefix("model."): tensor for key, tensor in weights.items()}
        weights = comfy.utils.clip_text_transformers_convert(weights, "", "")
    named = {parts.text_name(key.removeprefix("transformer.")): tensor for key, tensor in weights.items()}
    unused = ("logit_scale", "text_model.embeddings.position_ids")
    return {key: tensor for key, tensor in named.items() if key not in unused}


def _text_config(size: parts.TextEncoder) -> dict[str, int]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
    }


def _embeddings() -> list[str]:
    import folder_paths

    return folder_paths.get_folder_paths("embeddings")
