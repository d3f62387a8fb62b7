"""ComfyUI MODEL, CLIP and VAE -> weights on disk. The only file that takes the host's models apart.

Baking is core's (``ModelPatcher.model_state_dict_for_saving``, as ``comfy.sd.save_checkpoint`` uses it): right for a
model that is wholly, partly or not at all on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sd1_clip
import comfy.utils
import torch

from ..koala.architecture import components as parts
from ..koala.architecture import keys
from ..koala.architecture.keys import shapes_of
from ..koala.architecture.layout import name
from ..koala.files import atomic_write as disk
from ..koala.files import export
from ..koala.files.conventions import UNET_PREFIX
from ..koala.files.dtypes import dtype_name
from ..koala.model_info import ModelFacts
from .model import WEIGHT_DTYPES, model_facts

TOKENIZER_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
TEXT_PARTS = {"text_encoder": "clip_l.transformer.", "text_encoder_2": "clip_g.transformer."}
"""Part of a diffusers folder -> the names' prefix in core's CLIP, whose inner names are transformers 4's."""
State = dict[str, torch.Tensor]


class _Types(NamedTuple):
    """Types to write in; None keeps a tensor's own. ``matrices`` of the U-Net, and all ``others`` but the VAE."""

    matrices: torch.dtype | None
    others: torch.dtype | None


def save_checkpoint(
    target: Path, model: Any, clip: Any, vae: Any, weight_dtype: str = "default", extra: Mapping[str, str] | None = None
) -> None:
    """Write one .safetensors file in ComfyUI's numbering, all patches baked in; the VAE keeps its type.

    ``clip`` and ``vae`` None: the U-Net alone, as core's ModelSave writes it. ``weight_dtype``: a key of
    ``WEIGHT_DTYPES``. ``extra``: metadata of the caller's, such as the workflow.

    Raises:
        ValueError: MODEL is no KOALA, one of CLIP and VAE is missing, they are not SDXL's, or a value is beyond the
            range of ``weight_dtype``.
        disk.SaveError: the file cannot be written, or is there already. Whatever is raised, nothing is left behind.
    """
    facts, types = model_facts(model), _types(weight_dtype)
    if (clip is None) != (vae is None):
        absent = "CLIP" if clip is None else "VAE"
        raise ValueError(
            f"no {absent} is connected; a checkpoint holds MODEL, CLIP and VAE, or the U-Net of a MODEL alone. "
            f"Connect {absent}, too, or neither of them."
        )
    weights: State = {}
    _load(model, clip)
    if clip is not None:
        weights = model.model.state_dict_for_saving({}, _text(facts, clip, types), _autoencoder(vae))
    weights |= {f"{UNET_PREFIX}{key}": tensor for key, tensor in _unet(facts, model, types).items()}
    metadata = {**(extra or {}), **export.metadata(facts, target.stem, "sgm")}
    with disk.written_whole(target, _bytes(weights)) as aside:
        disk.write_safetensors(aside, weights, metadata)


def save_folder(
    target: Path, model: Any, clip: Any, vae: Any, weight_dtype: str = "default", extra: Mapping[str, str] | None = None
) -> None:
    """Write a Hugging Face folder as ``StableDiffusionXLPipeline.save_pretrained`` does, all patches baked in.

    Weights have the names without ``.fp16``, in any type: ``from_pretrained`` finds them without a variant.
    Parameters and errors as for ``save_checkpoint``, but CLIP and VAE are needed, and ValueError is raised also for a
    layout that diffusers' configuration cannot describe.
    """
    facts, types = model_facts(model), _types(weight_dtype)
    absent = [part for part, given in (("CLIP", clip), ("VAE", vae)) if given is None]
    if absent:
        raise ValueError(
            f"no {' and no '.join(absent)} is connected; a diffusers folder holds U-Net, text encoders and VAE. "
            f"Connect {' and '.join(absent)}, or save a checkpoint."
        )
    _load(model, clip)
    files = {"model_index.json": export.MODEL_INDEX, "scheduler/scheduler_config.json": export.scheduler_config(facts)}
    files["unet/config.json"] = export.unet_config(facts.layout, facts.side)
    weights: dict[str, State] = {}
    text = _text(facts, clip, types)
    for part in TEXT_PARTS:
        encoder = _encoder(text, part)
        files[f"{part}/config.json"] = export.text_config(part, parts.read_text_encoder(shapes_of(encoder)))
        weights[f"{part}/model.safetensors"] = encoder
    original = _autoencoder(vae)
    sizes = parts.read_autoencoder(shapes_of(original))
    files["vae/config.json"] = export.vae_config(sizes, facts.side)
    weights["vae/diffusion_pytorch_model.safetensors"] = _diffusers_vae(original, len(sizes.channels))
    names = keys.renaming(facts.layout, "comfy", "diffusers")
    unet = {names[key]: tensor for key, tensor in _unet(facts, model, types).items()}
    weights["unet/diffusion_pytorch_model.safetensors"] = unet
    contents = {file: export.as_json(content) for file, content in files.items()}
    for part, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        vocabulary = export.tokenizer_files(_vocabulary(), padding)
        contents |= {f"{part}/{file}": content for file, content in vocabulary.items()}
    metadata = {**(extra or {}), **export.metadata(facts, target.name, "diffusers")}
    _write_folder(target, weights, contents, metadata)


def _write_folder(
    target: Path, weights: Mapping[str, State], contents: Mapping[str, bytes], metadata: Mapping[str, str]
) -> None:
    size = sum(map(_bytes, weights.values())) + sum(map(len, contents.values()))
    with disk.written_whole(target, size) as aside:
        for file in (*weights, *contents):
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
        for file, part in weights.items():
            disk.write_safetensors(aside / file, part, metadata if file.startswith("unet/") else {"format": "pt"})
        # the index last: without it, nothing takes a folder for a model
        for file, content in sorted(contents.items(), key=lambda item: item[0] == "model_index.json"):
            disk.write_bytes(aside / file, content)


def _types(weight_dtype: str) -> _Types:
    """fp8 is for the U-Net's matrices and convolutions; its biases and norms, a thousandth of it, stay in fp16."""
    chosen = WEIGHT_DTYPES[weight_dtype]
    return _Types(chosen, torch.float16 if chosen == torch.float8_e4m3fn else chosen)


def _load(model: Any, clip: Any) -> None:
    """Bring U-Net and text encoders to the device, patches applied, as ``comfy.sd.save_checkpoint`` does."""
    patchers = [model] if clip is None else [model, clip.load_model()]
    comfy.model_management.load_models_gpu(patchers)


def _patched(patcher: Any, module: Any, prefix: str = "") -> State:
    """A module's tensors, core's stand-ins in the place of those that still have to be patched."""
    if hasattr(patcher, "model_state_dict_for_saving"):  # 0.26.0 has it; 0.18.2 does the same, for the U-Net alone
        return dict(patcher.model_state_dict_for_saving(module, prefix))
    state = dict(module.state_dict())
    for key in state:
        owner, _, kind = key.rpartition(".")
        layer = comfy.utils.get_attr(module, owner) if owner and kind in ("weight", "bias") else None
        if hasattr(layer, "comfy_cast_weights") and not getattr(layer, "comfy_patched_weights", False):
            weight = comfy.utils.get_attr(patcher.model, prefix + key)
            state[key] = comfy.model_patcher.LazyCastingParam(patcher, prefix + key, weight)
    return state


def _unet(facts: ModelFacts, model: Any, types: _Types) -> State:
    """The U-Net's tensors under ComfyUI's names without a prefix, baked."""
    state = _patched(model, model.model.diffusion_model, "diffusion_model.")
    cover = keys.coverage(facts.layout, "comfy", shapes_of(state))
    if not cover.exact:
        odd = (*cover.missing, *cover.extra, *cover.misshapen)
        raise ValueError(
            f"this MODEL's U-Net is no plain {name(facts.layout)}: {len(odd)} tensors differ (first: {odd[0]}); "
            f"expected weights as KOALA Checkpoint Loader builds them. Save a model that is neither quantised nor "
            f"otherwise rebuilt."
        )
    return _baked(state, types.matrices, types.others)


def _text(facts: ModelFacts, clip: Any, types: _Types) -> State:
    """Both text encoders under core's names (``clip_l.``, ``clip_g.``), baked."""
    state = _patched(clip.patcher, clip.cond_stage_model)
    try:
        first, second = (parts.read_text_encoder(shapes_of(_encoder(state, part))) for part in TEXT_PARTS)
        found = (first.hidden + second.hidden, second.projection)
    except KeyError:
        found = (0, None)
    wanted = (facts.layout.context, facts.layout.pooled)
    if found != wanted:
        what = f"gives text of width {found[0]} and pooled {found[1]}" if found[0] else "is no CLIP-L with a CLIP-G"
        raise ValueError(
            f"this CLIP {what}; {name(facts.layout)} expects SDXL's two text encoders of width {wanted[0]} and pooled "
            f"{wanted[1]}. Connect the CLIP that belongs to the MODEL."
        )
    return _baked(state, types.others, types.others)


def _encoder(text: State, part: str) -> State:
    """One text encoder under transformers' names. CLIP-L's projection is dropped: SDXL has no use for it, no file
    brings it and core leaves it unset."""
    prefix, unused = TEXT_PARTS[part], "text_projection.weight" if part == "text_encoder" else None
    found = {key[len(prefix) :]: tensor for key, tensor in text.items() if key.startswith(prefix)}
    return {key: tensor for key, tensor in found.items() if key != unused}


def _autoencoder(vae: Any) -> State:
    """The autoencoder's tensors under their original names, in their own types."""
    state = vae.get_sd()
    try:
        latents = parts.read_autoencoder(shapes_of(state)).latent_channels
        what = f"has {latents} latent channels"
    except KeyError:
        latents, what = 0, "is no autoencoder of SDXL's kind"
    if latents != 4:
        raise ValueError(f"this VAE {what}; expected SDXL's, with 4. Connect the VAE that belongs to the MODEL.")
    return _baked(state, None, None)


def _diffusers_vae(original: State, stages: int) -> State:
    found = {}
    for key, tensor in original.items():
        flat = ".mid.attn_1." in key and tensor.ndim == 4
        found[export.vae_name(key, stages)] = tensor[..., 0, 0] if flat else tensor
    return found


def _vocabulary() -> dict[str, bytes]:
    """The files of CLIP's tokenizer that come with the host."""
    folder = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
    return {file: (folder / file).read_bytes() for file in TOKENIZER_FILES}


def _baked(state: Mapping[str, torch.Tensor], matrices: torch.dtype | None, others: torch.dtype | None) -> State:
    """Tensors on the CPU, patches applied, floats in the type asked for; None keeps a tensor's own.

    Each tensor moves the node's progress bar, or ends the run if it was cancelled.
    """
    bar = comfy.utils.ProgressBar(len(state))
    found = {}
    for key, tensor in state.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        # core's stand-in for a weight that is not patched yet bakes it as it is taken to the CPU
        values = tensor.to("cpu").detach()
        dtype = matrices if values.ndim > 1 else others
        found[key] = _cast(key, values, dtype) if dtype and values.is_floating_point() else values
        bar.update(1)
    return found


def _cast(key: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in another type; raises ValueError where they do not fit into it."""
    if values.dtype == dtype:
        return values
    limit, largest = torch.finfo(dtype).max, float(values.float().abs().max())
    if largest > limit:
        raise ValueError(
            f"{key} holds the value {largest:g}; {dtype_name(dtype)} ends at {limit:g}. Choose another weight_dtype."
        )
    return values.to(dtype)


def _bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())
