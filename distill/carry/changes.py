"""What an adapter of any kind makes of a weight, in PyTorch alone, computed as KOALA LoRA Loader computes it.

The formulas are those of ComfyUI's weight adapters (comfy/weight_adapter), and for DoRA and the rescale of an OFT those
of PEFT and LyCORIS, as in host/transfer/adapters.py. Strength 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ...koala.architecture.keys import renaming
from ...koala.architecture.layout import Layout
from ...koala.lora.kinds import (
    ALPHA,
    BIAS,
    DORA_SCALE,
    DOWN,
    MID,
    NORM_BIAS,
    RESCALE,
    ROTATION,
    UP,
    WHOLE,
    split,
)

Parts = Mapping[str, Tensor]
"""One module's tensors: suffix of ``koala.lora.kinds`` -> tensor."""


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of ``koala.lora.weights.Loaded`` by module."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, suffix = split(name)
        found[module][suffix] = tensor if suffix == ALPHA else tensor.float()
    return found


def changed_weights(
    tensors: Mapping[str, Tensor], layout: Layout, weight: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The weights and biases of a U-Net that a LoRA changes, and what they become, fp32, one at a time.

    Args:
        tensors: the LoRA's, as in ``Loaded.unet``.
        layout: the U-Net's.
        weight: diffusers' name of a weight or bias -> the unchanged tensor.
    """
    names = renaming(layout, "comfy", "diffusers")
    for module, parts in grouped(tensors).items():
        own = module.removeprefix("diffusion_model.")
        yield from changed_module(parts, names[f"{own}.weight"].removesuffix(".weight"), weight)


def changed_module(parts: Parts, name: str, weight: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same for one module; ``name``: that by which ``weight`` knows it."""
    bias = next((parts[suffix] for suffix in (BIAS, NORM_BIAS) if suffix in parts), None)
    if parts.keys() - {BIAS, NORM_BIAS, ALPHA}:
        yield f"{name}.weight", changed(weight(f"{name}.weight"), parts)
    if bias is not None:
        own = weight(f"{name}.bias").float()
        yield f"{name}.bias", own + bias.to(own.device)


def changed(weight: Tensor, parts: Parts) -> Tensor:
    """What a module's tensors make of a weight; fp32, same shape and device."""
    weight = weight.float()
    parts = {suffix: tensor.to(weight.device) for suffix, tensor in parts.items()}
    if WHOLE in parts:
        return parts[WHOLE].reshape(weight.shape)
    if ROTATION in parts:
        return _rotated(weight, parts)
    merged = weight + _difference(weight, parts).reshape(weight.shape)
    if DORA_SCALE not in parts:
        return merged
    norms = parts[DORA_SCALE]
    across = tuple(axis for axis in range(merged.ndim) if norms.shape[axis] == 1)
    return merged * norms / (torch.linalg.vector_norm(merged, dim=across, keepdim=True) + torch.finfo(merged.dtype).eps)


def _difference(weight: Tensor, parts: Parts) -> Tensor:
    """What is added to a weight, in some shape with as many elements."""
    for suffix in (".diff", ".w_norm"):
        if suffix in parts:
            return parts[suffix]
    if UP in parts:
        down = parts[DOWN]
        if MID in parts:
            down = torch.einsum("abkl,bc->ackl", parts[MID], down.flatten(1))
        return _strength(parts, len(down)) * (parts[UP].flatten(1) @ down.flatten(1))
    if ".hada_w1_a" in parts:
        first, second = (_hadamard(parts, number) for number in (1, 2))
        rank = parts[".hada_w1_b"].shape[0]
        return _strength(parts, rank) * first.reshape(weight.shape) * second.reshape(weight.shape)
    if ".a1.weight" in parts:
        inner, outer, up, down = (parts[f".{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        own = torch.einsum("oi...,ir,rj->oj...", weight, inner.flatten(1), outer.flatten(1))
        sum_ = own + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        return _strength(parts, outer.shape[0]) * sum_
    return _kronecker(parts)


def _hadamard(parts: Parts, number: int) -> Tensor:
    """One of the two factors of a LoHa."""
    first, second = parts[f".hada_w{number}_a"], parts[f".hada_w{number}_b"]
    if (core := parts.get(f".hada_t{number}")) is not None:
        return torch.einsum("ijkl,jr,ip->prkl", core, second, first)
    return first @ second


def _kronecker(parts: Parts) -> Tensor:
    """The change of a LoKr."""
    rank = 0
    if (first := parts.get(".lokr_w1")) is None:
        first, rank = parts[".lokr_w1_a"] @ parts[".lokr_w1_b"], parts[".lokr_w1_b"].shape[0]
    if (second := parts.get(".lokr_w2")) is None:
        left, right, rank = parts[".lokr_w2_a"], parts[".lokr_w2_b"], parts[".lokr_w2_b"].shape[0]
        core = parts.get(".lokr_t2")
        second = left @ right if core is None else torch.einsum("ijkl,jr,ip->prkl", core, right, left)
    first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
    return (_strength(parts, rank) if rank else 1.0) * torch.kron(first, second.contiguous())


def _strength(parts: Parts, rank: int) -> float:
    return float(parts[ALPHA]) / rank if ALPHA in parts else 1.0


def _rotated(weight: Tensor, parts: Parts) -> Tensor:
    """OFT, with blocks [n, size, size], and BOFT, with several factors of them, [m, n, size, size]."""
    blocks = parts[ROTATION]
    skew, limit = blocks - blocks.transpose(-1, -2), float(parts.get(ALPHA, torch.zeros(())))
    length = float(skew.norm()) + 1e-8
    if 0 < limit < length:
        skew = skew * limit / length
    unit = torch.eye(blocks.shape[-1], device=blocks.device)
    rotations = (unit + skew) @ (unit - skew).inverse()
    if blocks.ndim == 3:
        rows = weight.unflatten(0, (len(blocks), -1))
        found = torch.einsum("knm,kn...->km...", rotations, rows).flatten(0, 1)
    else:
        found = weight
        for number, factor in enumerate(rotations):  # LyCORIS's butterflies: halves of blocks, ever further apart
            far = 2**number * (blocks.shape[-1] // 2)
            mixed = found.unflatten(0, (-1, 2, far)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, blocks.shape[-1]))
            turned = torch.einsum("bij,bj...->bi...", factor, mixed).flatten(0, 1)
            found = turned.unflatten(0, (-1, far, 2)).transpose(1, 2).flatten(0, 2)
    return found * parts[RESCALE] if RESCALE in parts else found
