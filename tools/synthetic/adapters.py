"""Adapters with random weights, of every kind and naming that is found: LoRAs, ControlNets, T2I-Adapters.

They test where a change lands, not what it looks like. Names and shapes come from the layout that one is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch

from koala_sdxl.koala.architecture.control_keys import control_tensors
from koala_sdxl.koala.architecture.keys import Numbering, Shape, Tensor, tensors
from koala_sdxl.koala.architecture.layout import KOALA_TINY, SDXL, Layout
from koala_sdxl.koala.architecture.lineage import at_widths_of

State = dict[str, torch.Tensor]
Parts = dict[str, torch.Tensor]
"""One module's part of a LoRA: suffix -> tensor, under kohya's suffixes."""

SMALL_SDXL = at_widths_of(KOALA_TINY, SDXL)
"""SDXL's layers at koala-tiny's widths: every layer that SDXL has, in a hundredth of its size."""

RANK = 2


def unet(layout: Layout, seed: int = 0) -> State:
    """A U-Net's weights under ComfyUI's names."""
    return random_state(((tensor.comfy, tensor.shape) for tensor in tensors(layout)), seed)


def random_state(shapes: Iterable[tuple[str, Shape]], seed: int) -> State:
    """Random weights, fp32, each with a deviation that keeps a signal's size; norms about 1, biases about 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes:
        if len(shape) == 1:
            state[name] = float(name.endswith(".weight")) + 0.1 * torch.randn(shape, generator=generator)
        else:
            state[name] = torch.randn(shape, generator=generator) / prod(shape[1:]) ** 0.5
    return state


# --- kinds of LoRA ------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of adapter: what it holds for a weight of some shape, and which weights it is made for."""

    parts: Callable[[Shape, Callable[..., torch.Tensor]], Parts]
    fits: Callable[[Tensor], bool]


Random = Callable[..., torch.Tensor]


def _lora(shape: Shape, random: Random) -> Parts:
    up, down = (shape[0], RANK, *[1] * (len(shape) - 2)), (RANK, *shape[1:])
    return {".lora_up.weight": random(*up), ".lora_down.weight": random(*down), ".alpha": torch.tensor(1.5)}


def _locon_mid(shape: Shape, random: Random) -> Parts:
    return {
        ".lora_up.weight": random(shape[0], RANK, 1, 1),
        ".lora_mid.weight": random(RANK, RANK, *shape[2:]),
        ".lora_down.weight": random(RANK, shape[1], 1, 1),
        ".alpha": torch.tensor(1.5),
    }


def _loha(shape: Shape, random: Random) -> Parts:
    parts = {".alpha": torch.tensor(1.5)}
    for n in (1, 2):
        parts |= {f".hada_w{n}_a": random(shape[0], RANK), f".hada_w{n}_b": random(RANK, prod(shape[1:]))}
    return parts


def _loha_tucker(shape: Shape, random: Random) -> Parts:
    parts = {".alpha": torch.tensor(1.5)}
    for n in (1, 2):
        parts |= {f".hada_w{n}_a": random(RANK, shape[0]), f".hada_w{n}_b": random(RANK, shape[1])}
        parts[f".hada_t{n}"] = random(RANK, RANK, *shape[2:])
    return parts


def _lokr(shape: Shape, random: Random) -> Parts:
    return {".lokr_w1": random(2, 4), ".lokr_w2": random(shape[0] // 2, shape[1] // 4, *shape[2:])}


def _lokr_low_rank(shape: Shape, random: Random) -> Parts:
    return {
        ".lokr_w1_a": random(2, RANK),
        ".lokr_w1_b": random(RANK, 4),
        ".lokr_w2_a": random(shape[0] // 2, RANK),
        ".lokr_w2_b": random(RANK, shape[1] // 4 * prod(shape[2:])),
        ".alpha": torch.tensor(1.5),
    }


def _dora(shape: Shape, random: Random) -> Parts:
    return {**_lora(shape, random), ".dora_scale": 1 + random(shape[0], *[1] * (len(shape) - 1)).abs()}


def _diff(shape: Shape, random: Random) -> Parts:
    return {".diff": random(*shape), ".diff_b": random(shape[0])}


def _norm(shape: Shape, random: Random) -> Parts:
    return {".w_norm": random(*shape), ".b_norm": random(*shape)}


def _matrix(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2


def _any(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1


def _kernel(tensor: Tensor) -> bool:
    return len(tensor.shape) == 4 and tensor.shape[2] > 1


def _divisible(tensor: Tensor) -> bool:
    return _any(tensor) and tensor.shape[0] % 2 == 0 and tensor.shape[1] % 4 == 0


def _biased(tensor: Tensor) -> bool:
    return _any(tensor) and "to_" not in tensor.diffusers


KINDS: dict[str, Kind] = {
    "LoRA": Kind(_lora, _matrix),
    "LoCon": Kind(_lora, _any),
    "LoCon with mid": Kind(_locon_mid, _kernel),
    "LoHa": Kind(_loha, _any),
    "LoHa, Tucker": Kind(_loha_tucker, _kernel),
    "LoKr": Kind(_lokr, _divisible),
    "LoKr, low rank": Kind(_lokr_low_rank, _divisible),
    "DoRA": Kind(_dora, _any),
    "whole differences": Kind(_diff, _biased),
    "norms": Kind(_norm, lambda tensor: len(tensor.shape) == 1),
}


# --- namings ------------------------------------------------------------------------------------------------------


def _processor(name: str) -> str:
    return name.replace(".to_", ".processor.to_").removesuffix(".0" if "to_out" in name else "")


class Naming(NamedTuple):
    """How a tool names a module, and its own words for kohya's suffixes."""

    module: Callable[[Tensor], str]
    suffixes: dict[str, str] = {}  # noqa: RUF012 - never written to


_PEFT = {".lora_up.weight": ".lora_B.weight", ".lora_down.weight": ".lora_A.weight"}

NAMINGS: dict[str, Naming] = {
    "kohya, LDM blocks": Naming(lambda tensor: f"lora_unet_{_stem(tensor.comfy).replace('.', '_')}"),
    "kohya, diffusers blocks": Naming(lambda tensor: f"lora_unet_{_stem(tensor.diffusers).replace('.', '_')}"),
    "SGM": Naming(lambda tensor: f"diffusion_model.{_stem(tensor.comfy)}"),
    "diffusers": Naming(
        lambda tensor: f"unet.{_processor(_stem(tensor.diffusers))}",
        {".lora_up.weight": "_lora.up.weight", ".lora_down.weight": "_lora.down.weight"},
    ),
    "diffusers, PEFT": Naming(
        lambda tensor: f"unet.{_stem(tensor.diffusers)}", {**_PEFT, ".dora_scale": ".lora_magnitude_vector"}
    ),
    "PEFT": Naming(
        lambda tensor: f"base_model.model.{_stem(tensor.diffusers)}",
        {**_PEFT, ".dora_scale": ".lora_magnitude_vector.weight"},
    ),
    "LyCORIS": Naming(lambda tensor: f"lycoris_{_stem(tensor.diffusers).replace('.', '_')}"),
}
"""OneTrainer names modules as kohya with diffusers' blocks."""


def lora(
    layout: Layout,
    kind: str = "LoRA",
    naming: str = "kohya, LDM blocks",
    seed: int = 0,
    only: Callable[[Tensor], bool] = lambda tensor: True,
) -> State:
    """A LoRA for a U-Net's layers, fp32; changes of about a tenth of a random weight's size."""
    generator = torch.Generator().manual_seed(seed)
    made, style, state = KINDS[kind], NAMINGS[naming], {}

    def random(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    for tensor in tensors(layout):
        if not (tensor.diffusers.endswith(".weight") and made.fits(tensor) and only(tensor)):
            continue
        for suffix, value in made.parts(tensor.shape, random).items():
            flat = value.flatten() if "magnitude" in style.suffixes.get(suffix, "") else value
            state[style.module(tensor) + style.suffixes.get(suffix, suffix)] = flat
    return state


def in_attention(tensor: Tensor) -> bool:
    """The modules that most SDXL LoRAs change: every matrix of the attention modules, 722 in SDXL."""
    return ".attentions." in tensor.diffusers and len(tensor.shape) == 2


def text_lora(layers: int, hidden: int, intermediate: int, name: str = "lora_te1", seed: int = 0) -> State:
    """The part of a LoRA that changes a CLIP text encoder, kohya's names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(layers):
        for module, rows, columns in (
            *((f"self_attn_{part}_proj", hidden, hidden) for part in ("q", "k", "v", "out")),
            ("mlp_fc1", intermediate, hidden),
            ("mlp_fc2", hidden, intermediate),
        ):
            prefix = f"{name}_text_model_encoder_layers_{layer}_{module}"
            state[f"{prefix}.lora_up.weight"] = 0.2 * torch.randn(rows, RANK, generator=generator)
            state[f"{prefix}.lora_down.weight"] = 0.2 * torch.randn(RANK, columns, generator=generator)
            state[f"{prefix}.alpha"] = torch.tensor(1.5)
    return state


# --- ControlNets --------------------------------------------------------------------------------------------------


def controlnet(layout: Layout = SMALL_SDXL, seed: int = 0, numbering: Numbering = "comfy") -> State:
    """An SDXL-family ControlNet: the U-Net's way down and middle, the hint's way to the latent's size, and a
    convolution for each residual. ``numbering``: "comfy" or "diffusers"."""
    return random_state(((getattr(tensor, numbering), tensor.shape) for tensor in control_tensors(layout)), seed)


def shallow(layout: Layout) -> Layout:
    """The layout with hardly any transformers, as the published middle-sized ControlNets have it."""
    depths, layers = (*(0 for _ in layout.down[:-1]), 1), len(layout.down[0])
    down, up = ((depth,) * layers for depth in depths), ((depth,) * (layers + 1) for depth in reversed(depths))
    return replace(layout, down=tuple(down), middle=1, up=tuple(up))


def _stem(tensor: str) -> str:
    return tensor.removesuffix(".weight")
