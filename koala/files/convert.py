"""State dicts in diffusers' and transformers' names -> those of single-file checkpoints, and back for the autoencoder.

Sources: diffusers' convert_diffusers_to_original_sdxl.py and ComfyUI's ``SDXL.process_clip_state_dict_for_saving``,
whose files these functions reproduce bit for bit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

from ..architecture.components import PROMPT_TOKENS, text_name

State = dict[str, torch.Tensor]
LOGIT_SCALE = 4.6055
"""ln 100: CLIP's temperature, which SDXL does not use and transformers' text encoders do not have."""

# --- text encoders -----------------------------------------------------------------------------------------------

UNUSED_IN_CLIP_L = ("text_projection.weight", "logit_scale")
"""SDXL takes CLIP-L's hidden states alone."""
_OPEN_CLIP_NAMES = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""transformers' name -> open_clip's, for CLIP-G; query, key and value are joined besides."""
_QUERY_KEY_VALUE = re.compile(r"^(.+\.self_attn)\.([qkv])_proj\.(weight|bias)$")


def transformers_names(encoder: Mapping[str, torch.Tensor]) -> State:
    """A text encoder's weights under transformers 4's names, whichever version named them."""
    named = {text_name(key): tensor for key, tensor in encoder.items()}
    return {key: tensor for key, tensor in named.items() if key != "text_model.embeddings.position_ids"}


def clip_l_for_checkpoint(encoder: Mapping[str, torch.Tensor]) -> State:
    """CLIP-L as single-file checkpoints store it: transformers' names, and the positions' numbers, (1, 77) int64."""
    state = {key: tensor for key, tensor in transformers_names(encoder).items() if key not in UNUSED_IN_CLIP_L}
    state["text_model.embeddings.position_ids"] = torch.arange(PROMPT_TOKENS).expand((1, -1))
    return {f"transformer.{key}": tensor for key, tensor in state.items()}


def clip_g_for_checkpoint(encoder: Mapping[str, torch.Tensor]) -> State:
    """CLIP-G as single-file checkpoints store it, under open_clip's names.

    Query, key and value become one tensor, of (3 * width, width) and (3 * width,); the projection is transposed.

    Raises ValueError where a layer lacks one of the three.
    """
    found: State = {}
    joined: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in transformers_names(encoder).items():
        if attention := _QUERY_KEY_VALUE.match(key):
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
    return {f"model.{_open_clip_name(key)}": tensor for key, tensor in found.items()}


def _open_clip_name(key: str) -> str:
    for transformers, open_clip in _OPEN_CLIP_NAMES:
        key = key.replace(transformers, open_clip)
    return key


# --- autoencoder -------------------------------------------------------------------------------------------------

_VAE_NAMES = (
    ("encoder.down.{stage}.block.", "encoder.down_blocks.{stage}.resnets."),
    ("encoder.down.{stage}.downsample.", "encoder.down_blocks.{stage}.downsamplers.0."),
    ("decoder.up.{stage}.block.", "decoder.up_blocks.{stage}.resnets."),
    ("decoder.up.{stage}.upsample.", "decoder.up_blocks.{stage}.upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
)
"""Original name -> diffusers'. diffusers counts the decoder's stages from its beginning, the original from its end."""
_VAE_MATRICES = re.compile(r"\.mid(\.attn_1\.(q|k|v|proj_out)|_block\.attentions\.0\.to_(q|k|v|out\.0))\.weight$")
"""The middle attention: convolutions of (width, width, 1, 1) under original names, (width, width) under diffusers'."""


def diffusers_vae(original: Mapping[str, torch.Tensor], stages: int) -> State:
    """An autoencoder's weights under diffusers' names; ``stages``: how many its decoder has."""
    return {
        vae_name(key, stages): tensor[..., 0, 0] if _VAE_MATRICES.search(key) and tensor.ndim == 4 else tensor
        for key, tensor in original.items()
    }


def original_vae(diffusers: Mapping[str, torch.Tensor], stages: int) -> State:
    """An autoencoder's weights under original names, as single-file checkpoints store it."""
    return {
        original_vae_name(key, stages): tensor[..., None, None]
        if _VAE_MATRICES.search(key) and tensor.ndim == 2
        else tensor
        for key, tensor in diffusers.items()
    }


def vae_name(original: str, stages: int) -> str:
    """An autoencoder tensor's diffusers name from its original one."""
    return _renamed(original, [(source, target) for source, target in _VAE_NAMES], stages)


def original_vae_name(diffusers: str, stages: int) -> str:
    """An autoencoder tensor's original name from its diffusers one."""
    return _renamed(diffusers, [(source, target) for target, source in _VAE_NAMES], stages)


def _renamed(name: str, table: list[tuple[str, str]], stages: int) -> str:
    for source, target in table:
        pattern = re.escape(source).replace(r"\{stage\}", r"(?P<stage>\d+)")
        if found := re.search(pattern, name):
            stage = int(found["stage"]) if "{stage}" in source else 0
            stage = stages - 1 - stage if source.startswith("decoder.") else stage
            name = name[: found.start()] + target.format(stage=stage) + name[found.end() :]
    return name
