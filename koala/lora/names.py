"""LoRA files: their names of a U-Net's modules, the tensors of a module, and which weight these are made for.

"LoRA" stands for every kind of adapter file: LoRA and LoCon, LoHa, LoKr, GLoRA, OFT, DoRA, full differences, norms and
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
"""Module's name in the file -> suffix -> the tensor's full name."""


def split(key: str) -> tuple[str, str]:
    """Module and suffix of a LoRA's tensor; the suffix is empty for a tensor of another kind."""
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


def fits(suffixes: Mapping[str, str], shapes: Mapping[str, Shape], weight: Shape) -> bool:
    """Whether a module's tensors are made for a weight of this shape; True for kinds that do not show it.

    Args:
        suffixes: the module's, each with the tensor's full name.
        shapes: of every tensor in the file, by full name.
        weight: shape of the weight to change.
    """
    found = size({suffix: shapes[key] for suffix, key in suffixes.items()})
    return found is None or found == (weight[0], prod(weight[1:]))


def size(module: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns of the weight that a module's tensors are made for; None for kinds that do not show it.

    ``module``: suffix -> shape. Mirrors how ComfyUI's weight adapters multiply the matrices of each kind.
    """
    try:
        return _size_of(module)
    except IndexError:  # a scalar or vector in place of a matrix: fits no weight
        return 0, 0


def _size_of(module: Mapping[str, Shape]) -> tuple[int, int] | None:
    if diff := module.get(".diff") or module.get(".w_norm") or module.get(".set_weight"):
        return diff[0], prod(diff[1:])
    if ".hada_w1_a" in module:
        return _product(module, ".hada_w1_a", ".hada_w1_b", ".hada_t1")
    if any(suffix.startswith(".lokr_") for suffix in module):
        first, second = (
            _matrix(module[f".lokr_w{n}"])
            if f".lokr_w{n}" in module
            else _product(module, f".lokr_w{n}_a", f".lokr_w{n}_b", f".lokr_t{n}")
            for n in (1, 2)
        )
        return first[0] * second[0], first[1] * second[1]
    up = _one(module, r"lora_up|lora_B|lora\.up|linear_layer\.up")
    down = _one(module, r"lora_down|lora_A|lora\.down|linear_layer\.down")
    if up and down:
        return up[0], prod(down[1:]) * prod(module.get(".lora_mid.weight", ())[2:])
    return None


def _one(module: Mapping[str, Shape], pattern: str) -> Shape | None:
    return next((shape for suffix, shape in module.items() if re.search(pattern, suffix)), None)


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _product(module: Mapping[str, Shape], first: str, second: str, core: str) -> tuple[int, int]:
    """Rows and columns of a product of two matrices, or of a Tucker core with both."""
    a, b = module.get(first, ()), module.get(second, ())
    if core in module:
        return a[1], b[1] * prod(module[core][2:])
    return a[0], prod(b[1:])
