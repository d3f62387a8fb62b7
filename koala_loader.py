"""Weights on disk -> ComfyUI MODEL, CLIP and VAE. The only file that builds the host's models.

Each model is read from a ``Source`` (a file's header and a name prefix) by a top-level function, so that the host can
build it again from its file when it needs a second copy (dynamic VRAM, torch.compile, multi-GPU:
``cached_patcher_init``). What is read once is shared as long as anyone has it: a second load gives another clone, as a
stock node's output does.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping
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
from .host.transfer.guard import guarded
from .host.vae import Vae
from .koala.architecture import components, keys
from .koala.architecture.component_keys import PROJECTION, TRANSPOSED_PROJECTION, text_name
from .koala.architecture.keys import shapes_of
from .koala.architecture.layout import Layout
from .koala.files.conventions import folder_label, label
from .koala.files.convert import original_vae
from .koala.files.dtypes import TORCH_DTYPES
from .koala.files.header import CheckpointError, Source
from .koala.files.inspect import (
    Checkpoint,
    Model,
    TextEncoderFile,
    UNetFile,
    VAEFile,
    inspect_checkpoint,
    inspect_folder,
    inspect_text_and_vae,
)

BUILT_IN = Path(__file__).parent / "assets" / "koala-tiny.safetensors"
CLIP_CONSTANTS = ("clip_l.logit_scale", "clip_g.logit_scale")
"""CLIP's temperature, ln 100, which the host's text encoders have of their own and SDXL does not use."""

Loaded = tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]

_unpatched: weakref.WeakValueDictionary[Hashable, comfy.model_patcher.ModelPatcher] = weakref.WeakValueDictionary()
"""What was loaded -> the patcher that it was loaded into, which is never given out: only clones of it are. A clone
keeps its parent, so that an entry lives exactly as long as anyone has the weights."""
_wrappings: weakref.WeakKeyDictionary[comfy.model_patcher.ModelPatcher, Any] = weakref.WeakKeyDictionary()
"""Patcher of a text encoder or VAE -> the CLIP or VAE around it, without patcher and network: so it keeps neither."""


def load_folder(folder: Path, weight_dtype: str = "default") -> Loaded:
    """Load a Hugging Face folder.

    Args:
        folder: the folder that holds model_index.json.
        weight_dtype: a key of ``WEIGHT_DTYPES``, for the U-Net.

    Raises CheckpointError for anything that is not a complete KOALA folder.
    """
    return _loaded(inspect_folder(folder), folder_label(folder), weight_dtype)


def load_checkpoint(path: Path, weight_dtype: str = "default") -> Loaded:
    """Load a single-file checkpoint, ComfyUI's numbering or diffusers' conversion script's.

    Raises FileNotFoundError, and CheckpointError for anything that is not a complete KOALA checkpoint.
    """
    return _loaded(inspect_checkpoint(path), path.name, weight_dtype)


def load_checkpoint_parts(path: Path, layout: Layout | None = None) -> tuple[comfy.sd.CLIP, comfy.sd.VAE]:
    """CLIP and VAE of any single-file checkpoint of the SDXL family; its U-Net is not read.

    Args:
        path: the file.
        layout: of the U-Net that they are for; None for any.

    Raises FileNotFoundError, and CheckpointError where one of them is absent, incomplete or of another width.
    """
    first, second, vae = inspect_text_and_vae(path, layout)
    return load_clip(first, second), load_vae(vae)


def _loaded(found: Checkpoint, source: str, weight_dtype: str) -> Loaded:
    unet = load_unet(found.model, source, weight_dtype)
    return unet, load_clip(found.text_encoder, found.text_encoder_2), load_vae(found.vae)


def load_unet(model: Model, source: str, weight_dtype: str = "default") -> comfy.model_patcher.ModelPatcher:
    """Build the MODEL of an inspected U-Net; what is known of it (``ModelFacts``) travels with it as an attachment, and
    a guard against add-ons by SDXL's numbers as a wrapper.

    Args:
        model: the inspected file.
        source: the name that the person chose, for reports.
        weight_dtype: a key of ``WEIGHT_DTYPES``.
    """
    unet, dtype = model.unet, WEIGHT_DTYPES[weight_dtype]
    patcher = guarded(_shared((unet,), lambda: _unet_patcher(unet, dtype), dtype))
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

    A file that was replaced or overwritten since is another source; and what was made in PyTorch's inference mode, in
    which nodes run, is of no use for training outside it.
    """
    places = ((source.path, source.prefix, source.header.stamp) for source in sources)
    key = (*places, dtype, torch.is_inference_mode_enabled())
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
    if not patcher.is_dynamic():  # what is streamed is converted when it is used
        weights = {name: tensor.to(weight_dtype) for name, tensor in weights.items()}
    renamed = {names[name]: tensor for name, tensor in weights.items()}
    _fill(model.diffusion_model, renamed, patcher, label(unet.path))
    if management.force_channels_last() and not patcher.is_dynamic():  # the host has ordered what was there before
        model.diffusion_model.to(memory_format=torch.channels_last)
    patcher.cached_patcher_init = (_unet_patcher, (unet, dtype))
    return patcher


def load_clip(first: TextEncoderFile, second: TextEncoderFile) -> comfy.sd.CLIP:
    """SDXL's CLIP from two text encoders of any size; ``first`` is CLIP-L, ``second`` CLIP-G."""
    return _wrapped((first, second), lambda: _clip(first, second), "cond_stage_model").clone()


def load_vae(file: VAEFile) -> comfy.sd.VAE:
    """An AutoencoderKL of any size from diffusers or original names."""
    return _wrapped((file,), lambda: _vae(file), "first_stage_model")


class _Clip(comfy.sd.CLIP):
    """The host's CLIP, filled as we fill; a clone of it is a plain CLIP.

    ``files`` names its text encoders' files, for an error.
    """

    def __init__(self, files: str, *arguments: Any, **options: Any) -> None:
        self._files = files
        super().__init__(*arguments, **options)

    def load_sd(self, sd: dict[str, torch.Tensor], full_model: bool = False) -> Any:
        return _fill(self.cond_stage_model, sd, self.patcher, self._files, CLIP_CONSTANTS)


def _clip(first: TextEncoderFile, second: TextEncoderFile, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    dtype = comfy.model_management.text_encoder_dtype(comfy.model_management.text_encoder_device())
    files = {"clip_l": first, "clip_g": second}
    state = {
        f"{name}.transformer.{key}": tensor
        for name, file in files.items()
        for key, tensor in _text(file, dtype).items()
    }
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    options: dict[str, Any] = {f"{name}_model_config": _text_config(file.sizes) for name, file in files.items()}
    clip = _Clip(
        " and ".join(dict.fromkeys(label(file.path) for file in files.values())),
        target,
        embedding_directory=_embeddings(),
        tokenizer_data={f"{name}_max_length": file.sizes.positions for name, file in files.items()},
        parameters=sum(tensor.numel() for tensor in state.values()),
        state_dict=state,
        model_options={**options, "dtype": dtype},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_clip_patcher, (first, second))
    return clip


def _vae(file: VAEFile) -> Vae:
    sizes = file.sizes
    # the host copies them into the type that it chooses
    weights = original_vae(read(file, only=file.tensors), len(sizes.channels))
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
    _require_same(label(file.path), _takes(vae.first_stage_model), weights)
    vae.patcher.cached_patcher_init = (_vae_patcher, (file,))
    return vae


def _clip_patcher(
    first: TextEncoderFile, second: TextEncoderFile, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    return _clip(first, second, disable_dynamic).patcher


def _vae_patcher(file: VAEFile, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return _vae(file).patcher


def _fill(
    network: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    patcher: comfy.model_patcher.ModelPatcher,
    file: str,
    constants: Collection[str] = (),
) -> Any:
    """Give a network its weights: these tensors themselves, on the device of the parameter that each replaces.

    Args:
        network: the host's.
        weights: by the network's own names.
        patcher: the network's.
        file: its name, for an error.
        constants: parameters of the network that it sets itself.

    Returns the names that were missing and those that were unexpected, as ``load_state_dict`` does. Raises
    CheckpointError where the two do not have the same tensors.
    """
    _require_same(file, {name: shape for name, shape in _takes(network).items() if name not in constants}, weights)
    if streamed():
        return network.load_state_dict(weights, strict=False, assign=patcher.is_dynamic())
    own = network.state_dict()
    placed = {name: tensor.to(own[name].device) for name, tensor in weights.items()}
    return network.load_state_dict(placed, strict=False, assign=True)


def _takes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors, also of those that it has only once they are loaded: with dynamic VRAM
    the host makes linear layers and embeddings without weights."""
    shapes = shapes_of(network.state_dict())
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight is None:
            shapes[f"{name}.weight"] = (layer.out_features, layer.in_features)
            if getattr(layer, "comfy_need_lazy_init_bias", False):
                shapes[f"{name}.bias"] = (layer.out_features,)
        elif isinstance(layer, torch.nn.Embedding) and layer.weight is None:
            shapes[f"{name}.weight"] = (layer.num_embeddings, layer.embedding_dim)
    return shapes


def _require_same(file: str, network: Mapping[str, tuple[int, ...]], weights: Mapping[str, torch.Tensor]) -> None:
    """Check that a network of the host's has the tensors that a file brings. Raises CheckpointError.

    The file was inspected before: this guards against a host that builds other networks of the same settings.
    """
    cover = keys.compare(network, shapes_of(weights))
    if not cover.exact:
        raise CheckpointError(
            f"{file} does not fill the network that this ComfyUI builds for it: {cover}; expected every tensor and no "
            f"other. Use a ComfyUI release that KOALA was tested with, and report this."
        )


def _text(file: TextEncoderFile, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A text encoder's tensors under transformers 4's names, from a file of its own or a checkpoint.

    CLIP-L mostly comes without a projection. The host's network has one that SDXL does not use: the identity here, not
    memory that nobody has written to.
    """
    weights = comfy.utils.clip_text_transformers_convert(read(file, dtype, file.tensors), "", "")  # open_clip's names
    if TRANSPOSED_PROJECTION in weights:
        weights[PROJECTION] = weights.pop(TRANSPOSED_PROJECTION).T.contiguous()
    named = {text_name(key): tensor for key, tensor in weights.items()}
    named.setdefault(PROJECTION, torch.eye(file.sizes.hidden, dtype=dtype))
    return named


def _text_config(size: components.TextEncoder) -> dict[str, int]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "max_position_embeddings": size.positions,
    }


def _embeddings() -> list[str]:
    import folder_paths

    return folder_paths.get_folder_paths("embeddings")
