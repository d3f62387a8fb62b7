"""A KOALA onto the disk, as one file or as a diffusers folder, from plain tensors: for the saving node and the trainer.

Everything is on the CPU and already in the type to write: ``cast_state`` makes it so. Files are written whole or not at
all. For a newly trained model, with ``dtypes = stored_dtypes("fp16")``::

    facts = ModelFacts(title, layout, "fp16", size, Identity(VARIANTS["base"], "as trained"), SCHEDULER_CONFIG, kept)
    others = TextAndVAE(cast_state(clip_l, dtypes.text), cast_state(clip_g, dtypes.text), vae)
    unet = cast_state(weights, dtypes)
    write_checkpoint(folder / "mine.safetensors", facts, unet, others, {"koala.distillation": ...})
    write_folder(folder / "mine", facts, unet, others, read_vocabulary(tokenizer), {"koala.distillation": ...})
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, isnan
from pathlib import Path
from typing import NamedTuple

import torch

from ..architecture.component_detection import read_autoencoder, read_text_encoder
from ..architecture.component_keys import PROJECTION
from ..architecture.components import Autoencoder, TextEncoder
from ..architecture.keys import coverage, renaming, shapes_of
from ..architecture.layout import name
from ..model_info import ModelFacts
from . import convert, export
from .atomic_write import write_bytes, write_safetensors, written_whole
from .conventions import CLIP_PREFIXES, UNET_PREFIX, VAE_PREFIX
from .convert import State
from .dtypes import TORCH_DTYPES, dtype_name

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"


class TextAndVAE(NamedTuple):
    """What a KOALA needs beside its U-Net: SDXL's text encoders (transformers' names, of version 4 or 5) and VAE
    (diffusers' names)."""

    text_encoder: Mapping[str, torch.Tensor]
    text_encoder_2: Mapping[str, torch.Tensor]
    vae: Mapping[str, torch.Tensor]


class StoredDtypes(NamedTuple):
    """Types to write in; None keeps a tensor's own. ``matrices`` of the U-Net, ``others`` of all else but the VAE."""

    matrices: torch.dtype | None
    others: torch.dtype | None

    @property
    def text(self) -> StoredDtypes:
        """The same for text encoders, all of whose tensors have one type."""
        return StoredDtypes(self.others, self.others)


def stored_dtypes(weight_dtype: str) -> StoredDtypes:
    """The types to write for one of our type names; "default" keeps every tensor's own.

    fp8 is for the U-Net's matrices and convolutions; its biases and norms, a thousandth of it, stay in fp16.
    """
    if weight_dtype == "default":
        return StoredDtypes(None, None)
    chosen = TORCH_DTYPES[weight_dtype]
    return StoredDtypes(chosen, torch.float16 if chosen.itemsize == 1 else chosen)


def cast_state(state: Mapping[str, torch.Tensor], dtypes: StoredDtypes) -> State:
    """Weights in the types to write: ``stored_dtypes(...)`` for a U-Net, its ``text`` for text encoders.

    Raises ValueError as ``cast``.
    """
    return {key: cast(key, values, dtypes) for key, values in state.items()}


def cast(key: str, values: torch.Tensor, dtypes: StoredDtypes) -> torch.Tensor:
    """One tensor in the type to write; integers keep theirs.

    Raises ValueError where a value is not a finite number, whatever the type, or beyond the range of the type to write.
    """
    if not values.is_floating_point():
        return values
    dtype = (dtypes.matrices if values.ndim > 1 else dtypes.others) or values.dtype
    # before the conversion: PyTorch's into fp8_e4m3fn makes 448 of infinity
    largest = _largest(values)
    if not isfinite(largest):
        what = "NaN" if isnan(largest) else "infinity"
        raise ValueError(
            f"{key} holds {what}; expected finite numbers. A LoRA or merge at too high a strength makes such weights: "
            f"lower it, or load the model again."
        )
    if largest > (limit := torch.finfo(dtype).max):
        raise ValueError(
            f"{key} holds the value {largest:g}; {dtype_name(dtype)} ends at {limit:g}. Choose another weight_dtype."
        )
    return values.to(dtype)


def _largest(values: torch.Tensor) -> float:
    """The largest absolute value; NaN where one is NaN, 0 where there is none."""
    wide = values if values.itemsize > 4 else values.float()
    return float(torch.stack(wide.aminmax()).abs().max()) if values.numel() else 0.0


def write_checkpoint(
    target: Path,
    facts: ModelFacts,
    unet: Mapping[str, torch.Tensor],
    text_and_vae: TextAndVAE | None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write one .safetensors file in ComfyUI's numbering, as ``comfy.sd.save_checkpoint`` names its tensors.

    Args:
        target: the new file.
        facts: what is known of the model: layout, variant, schedule, kept transformer blocks; written as metadata.
        unet: the U-Net's weights, diffusers' names.
        text_and_vae: text encoders and VAE; None writes the U-Net alone.
        extra: further metadata; where it has a key of ``export.metadata`` too, the latter is written.

    Raises:
        ValueError: the U-Net does not match the layout, or a text encoder or the VAE lacks a tensor.
        SaveError: the file cannot be written, or is there already; nothing is left behind.
    """
    weights = _prefixed(UNET_PREFIX, _renamed_unet(facts, unet))
    if text_and_vae:
        first, second, vae = text_and_vae
        _text_encoder("text_encoder", first), _text_encoder("text_encoder_2", second)
        weights |= _prefixed(CLIP_PREFIXES[0], convert.clip_l_for_checkpoint(first))
        weights |= _prefixed(CLIP_PREFIXES[1], convert.clip_g_for_checkpoint(second))
        weights |= _prefixed(VAE_PREFIX, convert.original_vae(vae, len(_autoencoder(vae).channels)))
    metadata = {**(extra or {}), **export.metadata(facts, target.stem, "sgm")}
    with written_whole(target, _bytes(weights)) as aside:
        write_safetensors(aside, weights, metadata)


def write_folder(
    target: Path,
    facts: ModelFacts,
    unet: Mapping[str, torch.Tensor],
    text_and_vae: TextAndVAE,
    vocabulary: Mapping[str, bytes],
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a Hugging Face folder as ``StableDiffusionXLPipeline.save_pretrained`` does.

    Weights have the names without ``.fp16``, in any type: ``from_pretrained`` finds them without a variant.

    Args:
        target: the new folder.
        facts, unet, text_and_vae, extra: as for ``write_checkpoint``; the metadata goes into the U-Net's file.
        vocabulary: CLIP's tokenizer files, name -> contents; see ``export.read_vocabulary``.

    Raises:
        ValueError: as ``write_checkpoint``, and for a layout that diffusers' configuration cannot describe.
        SaveError: the folder cannot be written, or is there already; nothing is left behind.
    """
    _require_layout(facts, unet)
    weights: dict[str, State] = {}
    configs = {
        "model_index.json": export.MODEL_INDEX,
        "scheduler/scheduler_config.json": export.scheduler_config(facts),
    }
    configs["unet/config.json"] = export.unet_config(facts.layout, facts.side)
    weights[f"unet/{WEIGHTS}"] = dict(unet)
    for part, encoder in (("text_encoder", text_and_vae.text_encoder), ("text_encoder_2", text_and_vae.text_encoder_2)):
        unused = convert.UNUSED_IN_CLIP_L if part == "text_encoder" else ("logit_scale",)
        state = {key: tensor for key, tensor in convert.transformers_names(encoder).items() if key not in unused}
        configs[f"{part}/config.json"] = export.text_config(part, _text_encoder(part, state))
        weights[f"{part}/{TEXT_WEIGHTS}"] = state
    configs["vae/config.json"] = export.vae_config(_autoencoder(text_and_vae.vae), facts.side)
    weights[f"vae/{WEIGHTS}"] = dict(text_and_vae.vae)
    contents = {file: export.as_json(config) for file, config in configs.items()}
    contents |= export.tokenizers(vocabulary)
    _write(target, weights, contents, {**(extra or {}), **export.metadata(facts, target.name, "diffusers")})


def _write(
    target: Path, weights: Mapping[str, State], contents: Mapping[str, bytes], metadata: Mapping[str, str]
) -> None:
    size = sum(map(_bytes, weights.values())) + sum(map(len, contents.values()))
    with written_whole(target, size) as aside:
        for file in (*weights, *contents):
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
        for file, state in weights.items():
            write_safetensors(aside / file, state, metadata if file.startswith("unet/") else {"format": "pt"})
        # the index last: without it, nothing takes a folder for a model
        for file, content in sorted(contents.items(), key=lambda item: item[0] == "model_index.json"):
            write_bytes(aside / file, content)


def _renamed_unet(facts: ModelFacts, unet: Mapping[str, torch.Tensor]) -> State:
    _require_layout(facts, unet)
    names = renaming(facts.layout, "diffusers", "comfy")
    return {names[key]: tensor for key, tensor in unet.items()}


def _require_layout(facts: ModelFacts, unet: Mapping[str, torch.Tensor]) -> None:
    cover = coverage(facts.layout, "diffusers", shapes_of(unet))
    if not cover.exact:
        faults = (*cover.missing, *cover.extra, *cover.misshapen)
        raise ValueError(
            f"this U-Net does not match the {name(facts.layout)} layout: {len(faults)} tensors differ (first: "
            f"{faults[0]}); expected every tensor of the layout and no other."
        )


def _text_encoder(part: str, encoder: Mapping[str, torch.Tensor]) -> TextEncoder:
    try:
        size = read_text_encoder(shapes_of(encoder))
        if part == "text_encoder_2" and not size.projection:
            raise KeyError(PROJECTION)
        return size
    except KeyError as missing:
        raise ValueError(f"{part} lacks {missing.args[0]}; expected a complete CLIP text encoder.") from None


def _autoencoder(vae: Mapping[str, torch.Tensor]) -> Autoencoder:
    try:
        return read_autoencoder(shapes_of(vae))
    except KeyError as missing:
        raise ValueError(f"the VAE lacks {missing.args[0]}; expected a complete AutoencoderKL.") from None


def _prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def _bytes(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())
