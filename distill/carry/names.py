"""Kohya's names of the text encoders' modules, as far as stock ComfyUI knows them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...koala.lora.kinds import ALPHA, split

TEXT = {"text_encoders.clip_l.transformer.": "lora_te1_", "text_encoders.clip_g.transformer.": "lora_te2_"}
IN_LAYERS = (".self_attn.", ".mlp.")
"""The modules that stock ComfyUI knows by kohya's names; all others keep ComfyUI's own."""


def text_names(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's tensors of the text encoders, unchanged, from ComfyUI's names to kohya's."""
    found: dict[str, Tensor] = {}
    for name, tensor in text.items():
        module, suffix = split(name)
        prefix = next(prefix for prefix in TEXT if module.startswith(prefix))
        if any(part in module for part in IN_LAYERS):
            module = TEXT[prefix] + module.removeprefix(prefix).replace(".", "_")
        found[module + suffix] = tensor.float() if suffix == ALPHA else tensor
    return found
