"""LoRA files: what they call the modules of a U-Net, what a module's tensors are, and which weight they are made for.

"LoRA" stands for every kind of adapter file: LoRA and LoCon, LoHa, LoKr, GLoRA, OFT, DoRA, whole differences, norms and
biases. All of them are a module's name and a suffix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from math import prod

from torch import Tensor

from ..architecture import keys
from ..architecture.keys import Shape, tensors
from ..architecture.layout import Layout
from ..files.conventions import UNET_PREFIX

SUFFIX = re.compile(
    r"(?:\.(?:alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight|rescale"
    r"|lora_(?:up|down|mid)\.weight|lora_[AB](?:\.default)?(?:\.weight)?|lora(?:_linear_layer)?\.(?:up|down)\.weight"
    r"|lora_magnitude_vector(?:\.default)?(?:\.weight)?"
    r"|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|[ab][12]\.weight|oft_(?:blocks|diag))"
    r"|_lora\.(?:up|down)\.weight)$"
)
MAGNITUDE = ".lora_magnitude_vector"  # PEFT's name, and a flat shape, for what every other tool calls dora_scale
TEXT = re.compile(r"^(?:lora_te\d?_|lora_prior_te_|text_encoders?(?:_\d)?\.|conditioner\.)")

Groups = Mapping[str, Mapping[str, str]]
"""Module's name in the file -> suffix -> the tensor's whole name."""


def split(key: str) -> tuple[str, str]:
    """Module and suffix of a LoRA's tensor; the suffix is empty where it is none of a LoRA's."""
    found = SUFFIX.search(key)
    return (key[: found.start()], found[0]) if found else (key, "")


@cache
def aliases(layout: Layout) -> dict[str, keys.Tensor]:
    """What LoRA files call each of a layout's modules -> the module's weight.

    kohya (both numberings), LyCORIS as SimpleTuner writes it, SGM and ComfyUI, diffusers (attention processors and
    PEFT, with PEFT's own prefixes), OneTrainer (as kohya's).
    """
    found: dict[str, keys.Tensor] = {}
    for tensor in tensors(layout):
        if not tensor.diffusers.endswith(".weight"):
            continue
        diffusers, comfy = (known.removesuffix(".weight") for known in (tensor.diffusers, tensor.comfy))
        processor = diffusers.replace(".to_", ".processor.to_").removesuffix(".0" if "to_out" in diffusers else "")
        for form in {diffusers, processor}:
            for prefix in ("", "unet.", "base_model.model.", "unet.base_model.model.", "base_model.model.unet."):
                found[prefix + form] = tensor
        for prefix in ("diffusion_model.", UNET_PREFIX):
            found[prefix + comfy] = tensor
        for form in (comfy, diffusers):
            found[f"lora_unet_{form.replace('.', '_')}"] = tensor
        found[f"lycoris_{diffusers.replace('.', '_')}"] = tensor
    return found


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that ``names`` lists, by their new names; PEFT's flat DoRA magnitudes get the dimensions of the
    weight that they scale, as other tools write them."""
    return {new: _upright(weights, old) if MAGNITUDE in old else weights[old] for old, new in names.items()}


def _upright(weights: Mapping[str, Tensor], magnitude: str) -> Tensor:
    module, _, end = magnitude.partition(MAGNITUDE)
    down = weights.get(f"{module}.lora_A{end or '.weight'}")
    return weights[magnitude].reshape(-1, *[1] * ((2 if down is None else down.ndim) - 1))


def fits(parts: Mapping[str, str], shapes: Mapping[str, Shape], wanted: Shape) -> bool:
    """Whether a module's tensors are for a weight of the ``wanted`` shape, or of a kind that does not tell."""
    made = size({suffix: shapes[key] for suffix, key in parts.items()})
    return made is None or made == (wanted[0], prod(wanted[1:]))


def size(parts: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns of the weight that an adapter is for, None for kinds that do not tell.

    Mirrors how ComfyUI's weight adapters put the matrices of each kind together.
    """
    try:
        return _size_of(parts)
    except IndexError:  # a scalar or vector where a matrix is due: fits nowhere
        return 0, 0


def _size_of(parts: Mapping[str, Shape]) -> tuple[int, int] | None:
    if diff := parts.get(".diff") or parts.get(".w_norm") or parts.get(".set_weight"):
        return diff[0], prod(diff[1:])
    if ".hada_w1_a" in parts:
        return _product(parts, ".hada_w1_a", ".hada_w1_b", ".hada_t1")
    if any(suffix.startswith(".lokr_") for suffix in parts):
        first, second = (
            _whole(parts[f".lokr_w{n}"])
            if f".lokr_w{n}" in parts
            else _product(parts, f".lokr_w{n}_a", f".lokr_w{n}_b", f".lokr_t{n}")
            for n in (1, 2)
        )
        return first[0] * second[0], first[1] * second[1]
    up = _one(parts, r"lora_up|lora_B|lora\.up|linear_layer\.up")
    down = _one(parts, r"lora_down|lora_A|lora\.down|linear_layer\.down")
    if up and down:
        return up[0], prod(down[1:]) * prod(parts.get(".lora_mid.weight", ())[2:])
    return None


def _one(parts: Mapping[str, Shape], pattern: str) -> Shape | None:
    return next((shape for suffix, shape in parts.items() if re.search(pattern, suffix)), None)


def _whole(shape: Shape) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _product(parts: Mapping[str, Shape], first: str, second: str, core: str) -> tuple[int, int]:
    """Rows and columns of a product of two matrices, or of a Tucker core with both."""
    a, b = parts.get(first, ()), parts.get(second, ())
    if core in parts:
        return a[1], b[1] * prod(parts[core][2:])
    return a[0], prod(b[1:])
