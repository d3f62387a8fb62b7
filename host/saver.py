"""ComfyUI MODEL, CLIP and VAE -> weights on disk. The only file that takes the host's models apart.

Baking is core's (``ModelPatcher.model_state_dict_for_saving``, as ``comfy.sd.save_checkpoint`` uses it): right for a
model that is wholly, partly or not at all on the device. What is baked, ``koala.files.write`` puts onto the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd1_clip
import comfy.utils
import torch

from ..koala.architecture import keys
from ..koala.architecture.component_detection import read_autoencoder, read_text_encoder
from ..koala.architecture.keys import shapes_of
from ..koala.architecture.layout import name
from ..koala.files.convert import State, diffusers_vae
from ..koala.files.export import read_vocabulary, unet_config
from ..koala.files.write import StoredDtypes, TextAndVAE, cast, stored_dtypes, write_checkpoint, write_folder
from ..koala.model_info import ModelFacts
from .model import model_facts
from .protocols import Clip, Model, Patcher, Vae

T = TypeVar("T")
TEXT_PREFIXES = ("clip_l.transformer.", "clip_g.transformer.")
"""Names' prefixes of the two text encoders in core's CLIP; the inner names are transformers 4's."""


def save_checkpoint(
    target: Path,
    model: Model,
    clip: Clip | None,
    vae: Vae | None,
    weight_dtype: str = "default",
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write one .safetensors file in ComfyUI's numbering, all patches baked in; the VAE keeps its type.

    ``clip`` and ``vae`` None: the U-Net alone, as core's ModelSave writes it. ``weight_dtype``: a key of
    ``WEIGHT_DTYPES``. ``extra``: metadata of the caller's, such as the workflow.

    Raises:
        ValueError: MODEL is not a KOALA model, one of CLIP and VAE is missing, they are not SDXL's, or a value is
            beyond the range of ``weight_dtype``.
        SaveError: the file cannot be written, or is there already. Whatever is raised, nothing is left behind.
    """
    facts, dtypes = model_facts(model), stored_dtypes(weight_dtype)
    if (clip is None) != (vae is None):
        absent = "CLIP" if clip is None else "VAE"
        raise ValueError(
            f"no {absent} is connected; a checkpoint holds MODEL, CLIP and VAE, or the U-Net of a MODEL alone. "
            f"Connect {absent}, too, or neither of them."
        )
    _load(model, clip)
    text_and_vae = None if clip is None or vae is None else _text_and_vae(facts, clip, vae, dtypes)
    write_checkpoint(target, facts, _unet(facts, model, dtypes), text_and_vae, extra)


def save_folder(
    target: Path,
    model: Model,
    clip: Clip | None,
    vae: Vae | None,
    weight_dtype: str = "default",
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a Hugging Face folder as ``StableDiffusionXLPipeline.save_pretrained`` does, all patches baked in.

    Weights have the names without ``.fp16``, in any type: ``from_pretrained`` finds them without a variant.
    Parameters and errors as for ``save_checkpoint``, but CLIP and VAE are needed, and ValueError is raised also for a
    layout that diffusers' configuration cannot describe.
    """
    facts, dtypes = model_facts(model), stored_dtypes(weight_dtype)
    if clip is None or vae is None:
        absent = [kind for kind, connected in (("CLIP", clip), ("VAE", vae)) if connected is None]
        raise ValueError(
            f"no {' and no '.join(absent)} is connected; a diffusers folder holds U-Net, text encoders and VAE. "
            f"Connect {' and '.join(absent)}, or save a checkpoint."
        )
    unet_config(facts.layout)  # a layout that it cannot describe is refused before anything is baked
    _load(model, clip)
    vocabulary = read_vocabulary(Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer")
    text_and_vae = _text_and_vae(facts, clip, vae, dtypes)
    write_folder(target, facts, _unet(facts, model, dtypes), text_and_vae, vocabulary, extra)


def _load(model: Model, clip: Clip | None) -> None:
    """Bring U-Net and text encoders to the device, patches applied, as ``comfy.sd.save_checkpoint`` does."""
    patchers: list[Model | Patcher] = [model] if clip is None else [model, clip.load_model()]
    comfy.model_management.load_models_gpu(patchers)


def _patched(patcher: Model | Patcher, module: torch.nn.Module, prefix: str = "") -> State:
    """A module's tensors, core's stand-ins in the place of those that still have to be patched."""
    if hasattr(patcher, "model_state_dict_for_saving"):  # 0.26.0 has it; 0.18.2 does the same, for the U-Net alone
        own, stand_ins = module.state_dict(), patcher.model_state_dict_for_saving(module, prefix)
        # with dynamic VRAM core patches small layers as it loads them, and has stand-ins that patch them once more
        return {key: own[key] if prefix + key in patcher.backup else stand_ins[key] for key in stand_ins}
    state = dict(module.state_dict())
    for key in state:
        owner, _, kind = key.rpartition(".")
        layer = comfy.utils.get_attr(module, owner) if owner and kind in ("weight", "bias") else None
        if hasattr(layer, "comfy_cast_weights") and not getattr(layer, "comfy_patched_weights", False):
            weight = comfy.utils.get_attr(patcher.model, prefix + key)
            state[key] = comfy.model_patcher.LazyCastingParam(patcher, prefix + key, weight)
    return state


def _unet(facts: ModelFacts, model: Model, dtypes: StoredDtypes) -> State:
    """The U-Net's tensors under diffusers' names, baked."""
    prefix = "diffusion_model."
    state = _patched(model, model.model.diffusion_model, prefix)
    cover = keys.coverage(facts.layout, "comfy", shapes_of(state))
    if not cover.exact:
        odd = (*cover.missing, *cover.extra, *cover.misshapen)
        raise ValueError(
            f"this MODEL's U-Net does not match the {name(facts.layout)} layout: {len(odd)} tensors differ (first: "
            f"{odd[0]}); expected weights as KOALA Checkpoint Loader builds them. Save a model that is neither "
            f"quantised nor otherwise rebuilt."
        )
    names = keys.renaming(facts.layout, "comfy", "diffusers")
    return {names[key]: tensor for key, tensor in _baked(state, dtypes, _under(model.patches, prefix)).items()}


def _text_and_vae(facts: ModelFacts, clip: Clip, vae: Vae, dtypes: StoredDtypes) -> TextAndVAE:
    return TextAndVAE(*_text(facts, clip, dtypes.text), _autoencoder(vae))


def _text(facts: ModelFacts, clip: Clip, dtypes: StoredDtypes) -> tuple[State, State]:
    """Both text encoders under transformers' names, baked."""
    state = _patched(clip.patcher, clip.cond_stage_model)
    try:
        first, second = (read_text_encoder(shapes_of(_under(state, prefix))) for prefix in TEXT_PREFIXES)
        widths = (first.hidden + second.hidden, second.projection)
    except KeyError:
        widths = (0, None)
    wanted = (facts.layout.context, facts.layout.pooled)
    if widths != wanted:
        what = f"gives text of width {widths[0]} and pooled {widths[1]}" if widths[0] else "is not CLIP-L with CLIP-G"
        raise ValueError(
            f"this CLIP {what}; {name(facts.layout)} expects SDXL's two text encoders of width {wanted[0]} and pooled "
            f"{wanted[1]}. Connect the CLIP that belongs to the MODEL."
        )
    baked = _baked(state, dtypes, clip.patcher.patches)
    clip_l, clip_g = (_under(baked, prefix) for prefix in TEXT_PREFIXES)
    clip_g["logit_scale"] = baked["clip_g.logit_scale"]
    return clip_l, clip_g


def _under(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Tensors, or their patches, whose names begin with ``prefix``, which is taken off."""
    return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def _autoencoder(vae: Vae) -> State:
    """The autoencoder's tensors under diffusers' names, in their own types."""
    state = vae.get_sd()
    try:
        sizes = read_autoencoder(shapes_of(state))
        latents, what = sizes.latent_channels, f"has {sizes.latent_channels} latent channels"
    except KeyError:
        latents, what = 0, "is not an autoencoder of SDXL's kind"
    if latents != 4:
        raise ValueError(f"this VAE {what}; expected SDXL's, with 4. Connect the VAE that belongs to the MODEL.")
    return diffusers_vae(_baked(state, StoredDtypes(None, None)), len(sizes.channels))


def _baked(
    state: Mapping[str, torch.Tensor], dtypes: StoredDtypes, patches: Mapping[str, list[Any]] = MappingProxyType({})
) -> State:
    """Tensors on the CPU, patches applied, floats in the types to write; ``patches`` are those that core applies.

    Each tensor moves the node's progress bar, or ends the run if it was cancelled.
    """
    bar = comfy.utils.ProgressBar(len(state))
    baked = {}
    for key, tensor in state.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        # core's stand-in for a weight that is not patched yet bakes it as it is taken to the CPU
        own = tensor.to("cpu").detach()
        if key in patches and own.is_floating_point() and own.itemsize == 1:
            # core has made 448 of infinity, where the weights are fp8: what the patches make is looked at before that
            cast(key, comfy.lora.calculate_weight(patches[key], own.float(), key), stored_dtypes("default"))
        baked[key] = cast(key, own, dtypes)
        bar.update(1)
    return baked
