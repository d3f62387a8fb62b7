"""SDXL's layout grown out of a koala-tiny: where an SDXL of this width begins without a GPU.

The distillation's cut, the other way round: the layers that koala-tiny has begin as they are in it, and SDXL's other
layers begin at random.
"""

from __future__ import annotations

import re

import torch

from koala_sdxl.koala.architecture.layout import KOALA_TINY, SDXL
from koala_sdxl.koala.architecture.lineage import at_widths_of, lineage
from tools.tiny.denoiser import new_unet

SDXL_TINY = at_widths_of(KOALA_TINY, SDXL)
State = dict[str, torch.Tensor]
_LAST = re.compile(r"\.(conv2|to_out\.0|net\.2|proj_out)\.")
"""The last layer of each of a U-Net's additions to what passes through."""


def grown(koala: State, share: float = 1.0, seed: int = 0) -> State:
    """The weights of a U-Net of SDXL's layers, under diffusers' names.

    Args:
        koala: koala-tiny's, under diffusers' names.
        share: what the layers that koala-tiny lacks add, as a share of what they would with PyTorch's initial weights.
            With none of it the U-Net's output is koala-tiny's.
        seed: of the random weights.
    """
    torch.manual_seed(seed)
    state = dict(new_unet(SDXL_TINY).state_dict())
    kept = {whole.diffusers: koala[part.diffusers] for part, whole in lineage(KOALA_TINY).tensors}
    for name, weight in state.items():
        if name in kept:
            state[name] = kept[name]
        elif "conv_shortcut" in name:  # on the way up: what comes from below, and nothing of the skip
            state[name] = torch.eye(*weight.shape[:2])[:, :, None, None] if weight.ndim == 4 else 0 * weight
        elif _LAST.search(name):
            state[name] = share * weight
    return state
