"""Weights on disk -> ComfyUI MODEL, CLIP and VAE. The only file that builds the host's models.

Each model is read from a ``Source`` (a file's header and a name prefix) by a top-level function, so that the host can
build it again from its file when it needs a second copy (dynamic VRAM, torch.compile, multi-GPU:
``cached_patcher_init``). What is read once is shared as long as anyone has it: a second load gives another clone, as a
stock node's output does.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch

from .host.model import ATTACHMENT, WEIGHT_DTYPES
from .host.reader import read, streamed
from .koala.architecture import components, keys
from .koala.architecture.component_detection import read_text_encoder
from .koala.architecture.component_keys import text_name
from .koala.architecture.keys import shapes_of
from .koala.architecture.layout import Layout
from .koala.files.conventions import CLIP_PREFIXES
from .koala.files.dtypes import TORCH_DTYPES
from .koala.files.header import Source
from .koala.files.inspect import (
    Checkpoint,
    Model,
    UNetFile,
    VAEFile,
    inspect_checkpoint,
    inspect_folder,
    inspect_text_and_vae,
)

BUILT_IN = Path(__file__).parent / "assets" / "koala-tiny.safetensors"
TILES = (64, 32, 16)
"""Sides, in latents, of the tiles in which an image is decoded that is too large to be decoded at once."""

Loaded = tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]

_unpatched: weakref.WeakValueDictionary[Hashable, comfy.model_patcher.ModelPatcher] = weakref.WeakValueDictionary()
"""What was loaded -> the patcher that it was loaded into, which is never given out: only clones of it are. A clone
keeps its parent, so that an entry lives exactly as long as anyone has the weights."""
_wrappings: weakref.WeakKeyDictionary[comfy.model_patcher.ModelPatcher, Any] = weakref.WeakKeyDictionary()
"""Patcher of a text encoder or VAE -> the CLIP or VAE around it, without patcher and network: so it keeps neither."""


class Vae(comfy.sd.VAE):
    """The host's VAE, which also decodes in tiles on a CPU, where no error tells that memory is short."""

    def decode(self, samples_in: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Decode latents.

        In tiles where the host's estimate of the memory that the full size takes is more than the machine has free.

        Args:
            samples_in: (N, 4, h, w).

        Returns: an image (N, 8h, 8w, 3) in 0..1.
        """
        tile = None
        if comfy.model_management.is_device_cpu(self.device):
            height, width = samples_in.shape[-2:]
            need = self.memory_used_decode(samples_in.shape, self.vae_dtype)
            free = comfy.model_management.get_free_memory(self.device)
            tile = decode_tile(height, width, need, free)
        if tile is None:
            return super().decode(samples_in, *arguments, **options)
        logging.info(
            f"KOALA: decoding {8 * width}x{8 * height} pixels in tiles of {8 * tile}: the full size may take "
            f"{need / 2**30:.1f} GiB, free are {free / 2**30:.1f} GiB."
        )
        return self.decode_tiled(samples_in, tile_x=tile, tile_y=tile, overlap=tile // 4)


def decode_tile(height: int, width: int, need: float, free: float) -> int | None:
    """Side, in latents, of the tiles in which to decode a latent; None to decode it at once.

    The largest tile that fits is taken, or else the smallest. A tile takes as much of ``need`` as it has of the area.

    Args:
        height, width: of the latent.
        need: bytes that decoding it at once takes.
        free: bytes of free memory.
    """
    if need <= free:
        return None
    fitting = (side for side in TILES if side * side < height * width and need * side * side <= free * height * width)
    return next(fitting, TILES[-1])


def load_folder(folder: Path, weight_dtype: str = "default") -> Loaded:
    """Load a Hugging Face folder.

    Args:
        folder: the folder that holds model_index.json.
        weight_dtype: a key of ``WEIGHT_DTYPES``, for the U-Net.

    Raises CheckpointError for anything that is not a complete KOALA folder.
    """
    return _loaded(inspect_folder(folder), folder.name, weight_dtype)


def load_checkpoint(path: Path, weight_dtype: str = "default") -> Loaded:
    """Load a single-file checkpoint, ComfyUI's numbering or diffusers' conversion script's.

    Raises FileNotFoundError, and CheckpointError for anything that is not a complete KOALA checkpoint.
    """
    return _loaded(inspect_checkpoint(path), path.name, weight_dtype)


def load_checkpoint_parts(path: Path) -> tuple[comfy.sd.CLIP, comfy.sd.VAE]:
    """CLIP and VAE of any single-file checkpoint of the SDXL family; its U-Net is not read."""
    first, second, vae = inspect_text_and_vae(path)
    return load_clip(first, second), load_vae(vae)


def _loaded(found: Checkpoint, source: str, weight_dtype: str) -> Loaded:
    unet = load_unet(found.model, source, weight_dtype)
    return unet, load_clip(found.text_encoder, found.text_encoder_2), load_vae(found.vae)


def load_unet(model: Model, source: str, weight_dtype: str = "default") -> comfy.model_patcher.ModelPatcher:
    """Build the MODEL of an inspected U-Net; what is known of it (``ModelFacts``) travels with it as an attachment.

    Args:
        model: the inspected file.
        source: the name that the person chose, for reports.
        weight_dtype: a key of ``WEIGHT_DTYPES``.
    """
    unet, dtype = model.unet, WEIGHT_DTYPES[weight_dtype]
    patcher = _shared((unet,), lambda: _unet_patcher(unet, dtype), dtype).clone()
    patcher.set_attachments(ATTACHMENT, model.facts(source))
    return patcher


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


def _shared(
    sources: tuple[Source, ...],
    build: Callable[[], comfy.model_patcher.ModelPatcher],
    dtype: torch.dtype | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """The patcher that was built of the same sources, where anyone still has a clone of it, or else a new one.

    A file that was replaced since is another source; and what was made in PyTorch's inference mode, in which nodes run,
    is of no use for training outside it.
    """
    files = [source.path.stat() for source in sources]
    places = ((source.path, source.prefix) for source in sources)
    stamps = ((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)
    key = (*places, *stamps, dtype, torch.is_inference_mode_enabled())
    patcher = _unpatched.get(key)
    if patcher is None:
        patcher = _unpatched[key] = build()
    return patcher


def _wrapped(sources: tuple[Source, ...], build: Callable[[], Any], network: str) -> Any:
    """A CLIP or VAE around a clone of the shared patcher; ``network`` is its attribute that holds the network."""

    def unwrapped() -> comfy.model_patcher.ModelPatcher:
        built = build()
        wrapping = _wrappings[built.patcher] = copy.copy(built)
        wrapping.patcher = None
        setattr(wrapping, network, None)
        return built.patcher

    patcher = _shared(sources, unwrapped)
    wrapper = copy.copy(_wrappings[patcher])
    wrapper.patcher = patcher.clone()
    setattr(wrapper, network, patcher.model)
    return wrapper


def _unet_patcher(
    unet: UNetFile, dtype: torch.dtype | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Build core's SDXL model for any layout and fill it, as ``comfy.sd.load_diffusion_model`` does for known ones."""
    management = comfy.model_management
    device, offload_device = management.get_torch_device(), management.unet_offload_device()
    config = comfy.supported_models.SDXL(unet_config(unet.layout))
    weight_dtype = dtype or management.unet_dtype(
        model_params=keys.parameters(unet.layout),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=TORCH_DTYPES[unet.dtype],
    )
    cast = management.unet_manual_cast(weight_dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(weight_dtype, cast)
    model = config.get_model({}, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    names = keys.renaming(unet.layout, unet.numbering, "comfy")
    weights = read(unet, weight_dtype)
    _fill(model.diffusion_model, {names[name]: tensor for name, tensor in weights.items()}, patcher)
    patcher.cached_patcher_init = (_unet_patcher, (unet, dtype))
    return patcher


def load_clip(first: Source, second: Source) -> comfy.sd.CLIP:
    """SDXL's CLIP from two text encoders of any size; ``first`` is CLIP-L, ``second`` CLIP-G."""
    return _wrapped((first, second), lambda: _clip(first, second), "cond_stage_model").clone()


def load_vae(file: VAEFile) -> comfy.sd.VAE:
    """An AutoencoderKL of any size from diffusers or original names."""
    return _wrapped((file,), lambda: _vae(file), "first_stage_model")


class _Clip(comfy.sd.CLIP):
    """The host's CLIP, filled as we fill; a clone of it is a plain CLIP."""

    def load_sd(self, sd: dict[str, torch.Tensor], full_model: bool = False) -> Any:
        return _fill(self.cond_stage_model, sd, self.patcher)


def _clip(first: Source, second: Source, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    dtype = comfy.model_management.text_encoder_dtype(comfy.model_management.text_encoder_device())
    encoders = {"clip_l": _read_text(first, dtype), "clip_g": _read_text(second, dtype)}
    sizes = {name: read_text_encoder(shapes_of(weights)) for name, weights in encoders.items()}
    state = {
        f"{name}.transformer.{key}": tensor for name, weights in encoders.items() for key, tensor in weights.items()
    }
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    options: dict[str, Any] = {f"{name}_model_config": _text_config(size) for name, size in sizes.items()}
    clip = _Clip(
        target,
        embedding_directory=_embeddings(),
        parameters=sum(tensor.numel() for tensor in state.values()),
        state_dict=state,
        model_options={**options, "dtype": dtype},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_clip_patcher, (first, second))
    return clip


def _vae(file: VAEFile) -> Vae:
    weights, sizes = read(file), file.sizes  # the host copies them into the type that it chooses
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
    vae = Vae(sd=weights, config={"params": config})
    vae.patcher.cached_patcher_init = (_vae_patcher, (file,))
    return vae


def _clip_patcher(first: Source, second: Source, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return _clip(first, second, disable_dynamic).patcher


def _vae_patcher(file: VAEFile, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return _vae(file).patcher


def _fill(
    network: torch.nn.Module, weights: Mapping[str, torch.Tensor], patcher: comfy.model_patcher.ModelPatcher
) -> Any:
    """Give a network its weights: these tensors themselves, on the device of the parameter that each replaces.

    Returns the names that were missing and those that were unexpected, as ``load_state_dict`` does.
    """
    if streamed():
        return network.load_state_dict(weights, strict=False, assign=patcher.is_dynamic())
    own = network.state_dict()
    placed = {name: tensor.to(own[name].device) if name in own else tensor for name, tensor in weights.items()}
    return network.load_state_dict(placed, strict=False, assign=True)


def _read_text(source: Source, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A text encoder's tensors under transformers' names, from a file of its own or a checkpoint."""
    weights = read(source, dtype)
    if source.prefix == CLIP_PREFIXES[1]:  # open_clip's names
        weights = {key.removeprefix("model."): tensor for key, tensor in weights.items()}
        weights = comfy.utils.clip_text_transformers_convert(weights, "", "")
    named = {text_name(key.removeprefix("transformer.")): tensor for key, tensor in weights.items()}
    unused = ("logit_scale", "text_model.embeddings.position_ids")
    return {key: tensor for key, tensor in named.items() if key not in unused}


def _text_config(size: components.TextEncoder) -> dict[str, int]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
    }


def _embeddings() -> list[str]:
    import folder_paths

    return folder_paths.get_folder_paths("embeddings")
