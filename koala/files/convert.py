"""State dicts in diffusers' and transformers' names -> those of single-file checkpoints, and back for the autoencoder.

Sources: diffusers' convert_diffusers_to_original_sdxl.py and ComfyUI's ``SDXL.process_clip_state_dict_for_saving``,
whose files these functions reproduce bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from ..architecture.component_keys import (
    QUERY_KEY_VALUE,
    VAE_MATRICES,
    open_clip_name,
    original_vae_name,
    text_name,
    vae_name,
)

State = dict[str, torch.Tensor]
LOGIT_SCALE = 4.6055
"""ln 100: CLIP's temperature, which SDXL does not use and transformers' text encoders do not have."""

# --- text encoders -----------------------------------------------------------------------------------------------

UNUSED_IN_CLIP_L = ("text_projection.weight", "logit_scale")
"""SDXL takes CLIP-L's hidden states alone."""


def transformers_names(encoder: Mapping[str, torch.Tensor]) -> State:
    """A text encoder's weights under transformers 4's names, whichever version named them."""
    named = {text_name(key): tensor for key, tensor in encoder.items()}
    return {key: tensor for key, tensor in named.items() if key != "text_model.embeddings.position_ids"}


def clip_l_for_checkpoint(encoder: Mapping[str, torch.Tensor]) -> State:
    """CLIP-L as single-file checkpoints store it: transformers' names, and the positions' numbers, (1, n) int64.

    n is 77; 248 in LongCLIP.
    """
    state = {key: tensor for key, tensor in transformers_names(encoder).items() if key not in UNUSED_IN_CLIP_L}
    positions = len(state["text_model.embeddings.position_embedding.weight"])
    state["text_model.embeddings.position_ids"] = torch.arange(positions).expand((1, -1))
    return {f"transformer.{key}": tensor for key, tensor in state.items()}


def clip_g_for_checkpoint(encoder: Mapping[str, torch.Tensor]) -> State:
    """CLIP-G as single-file checkpoints store it, under open_clip's names.

    Query, key and value become one tensor, of (3 * width, width) and (3 * width,); the projection is transposed.

    Raises ValueError where a layer lacks one of the three.
    """
    found: State = {}
    joined: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in transformers_names(encoder).items():
        if attention := QUERY_KEY_VALUE.match(key):
            joined[f"{attention[1]}.in_proj_{attention[3]}"][attention[2]] = tensor
        elif key == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        else:
            found[key] = tensor
    for key, parts in joined.items():
        if parts.keys() != set("qkv"):
            raise ValueError(f"{key} of CLIP-G: only {', '.join(sorted(parts))} of q, k and v; expected all three.")
        found[key] = torch.cat([parts[which] for which in "qkv"])
    if "logit_scale" not in found:
        found["logit_scale"] = torch.tensor(LOGIT_SCALE, dtype=next(iter(found.values())).dtype)
    return {f"model.{open_clip_name(key)}": tensor for key, tensor in found.items()}


# --- autoencoder -------------------------------------------------------------------------------------------------


def diffusers_vae(original: Mapping[str, torch.Tensor], stages: int) -> State:
    """An autoencoder's weights under diffusers' names; ``stages``: how many its decoder has."""
    return {
        vae_name(key, stages): tensor[..., 0, 0] if VAE_MATRICES.search(key) and tensor.ndim == 4 else tensor
        for key, tensor in original.items()
    }


def original_vae(diffusers: Mapping[str, torch.Tensor], stages: int) -> State:
    """An autoencoder's weights under original names, as single-file checkpoints store it."""
    return {
        original_vae_name(key, stages): tensor[..., None, None]
        if VAE_MATRICES.search(key) and tensor.ndim == 2
        else tensor
        for key, tensor in diffusers.items()
    }
