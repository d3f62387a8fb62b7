"""A LoRA's changes as numbers that can be learned: factors of weights, whole differences of norms and biases.

They are named by diffusers' names of the weights; ``lora_tensors`` gives them the names that LoRA files have.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..architecture.keys import tensors
from ..architecture.layout import Layout
from .fit import Changes, low_rank
from .kinds import ALPHA, BIAS

UP, DOWN = " up", " down"
"""What follows a weight's name in the names of its two factors: [out, rank] and [rank, in]."""
FAINT = 1e-2
"""A direction of a factor is taken to be unused below this share of the strongest."""
KOHYA = {UP: ".lora_up.weight", DOWN: ".lora_down.weight"}
W_NORM = ".w_norm"


def factors(changes: Iterable[tuple[str, Tensor]], rank: int) -> Changes:
    """Changes of weights as products of two factors, of a rank at most; of norms and biases as they are.

    Where a change has a lower rank, the further rows of ``DOWN`` are directions that have no effect yet, as ``UP`` is
    zero there, and can get one.
    """
    found: Changes = {}
    for name, change in changes:
        if change.ndim == 1:
            found[name] = change
            continue
        matrix = change.flatten(1)
        up, down = low_rank(matrix, min(rank, *matrix.shape))
        lengths = down.norm(dim=1)
        used = lengths > FAINT * lengths.max().clamp(min=1e-12)
        usual = lengths[used].mean() if used.any() else torch.tensor(1.0)
        free = torch.randn(down.shape, generator=torch.Generator().manual_seed(len(found))) / down.shape[1] ** 0.5
        found[name + UP] = torch.where(used, up, 0.0)
        found[name + DOWN] = torch.where(used[:, None], down, usual * free)
    return found


def rounded(changes: Changes) -> Changes:
    """The numbers as a file has them, fp32. Raises ValueError for one that fp16 cannot hold."""
    found = {name: tensor.half().float() for name, tensor in changes.items()}
    if bad := next((name for name, tensor in found.items() if not tensor.isfinite().all()), None):
        raise ValueError(
            f"the new LoRA has a number that fp16 cannot hold, in {bad}; expected at most 65,504. Take a weaker LoRA."
        )
    return found


def lora_tensors(changes: Changes, layout: Layout) -> dict[str, Tensor]:
    """The LoRA under kohya's names, fp16, with ComfyUI's numbers of the U-Net's blocks, which differ from SDXL's."""
    known = {tensor.diffusers: tensor for tensor in tensors(layout)}
    found: dict[str, Tensor] = {}
    for name, change in changes.items():
        end = next((end for end in KOHYA if name.endswith(end)), "")
        weight = known[name.removesuffix(end)]
        module, _, kind = weight.comfy.rpartition(".")
        key, number = f"lora_unet_{module.replace('.', '_')}", change.half().contiguous()
        if end == UP:
            found[key + KOHYA[UP]] = number.reshape(*number.shape, *[1] * (len(weight.shape) - 2))
            found[key + ALPHA] = torch.tensor(float(number.shape[1]), dtype=torch.float16)
        elif end == DOWN:
            found[key + KOHYA[DOWN]] = number.reshape(-1, *weight.shape[1:])
        else:
            found[key + (W_NORM if kind == "weight" else BIAS)] = number
    return found
