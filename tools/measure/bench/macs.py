"""Multiplications of a forward pass, counted on tensors without contents: nothing is loaded and nothing computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from koala_sdxl import koala_loader
from koala_sdxl.host.accelerate.branches import Branches, Call
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, SDXL, Layout, name
from tools.synthetic import random_weights

NAMES = {SDXL: "SDXL"}
LAYERS = {"input_blocks": 2, "middle_block": 1, "output_blocks": 2}
"""Numbers in the name of a layer of a block."""
SHARED_AT = 512  # px at which the shares of the blocks are counted


def counted(sizes: list[int], layouts: Sequence[Layout] = (KOALA_700M, KOALA_1B, SDXL)) -> dict[str, Any]:
    """For each U-Net and size in pixels: multiplications of one unguided image's pass, by operation; the shares of
    the blocks, and of the shallow branch; and the VAE decoder's."""
    unets = {}
    for layout in layouts:
        unet = network(layout)
        at = {px: _count(partial(_run, unet, layout, px)) for px in {*sizes, SHARED_AT}}
        unets[NAMES.get(layout, name(layout))] = {
            "sizes": {str(px): at[px]["by_operation"] for px in sizes},
            "blocks": at[SHARED_AT]["blocks"],
            "shallow": shallow_share(unet, layout),
        }
    return {"unets": unets, "vae": {str(px): _count(partial(_decode, px))["by_operation"] for px in sizes}}


def network(layout: Layout) -> UNetModel:
    """The host's U-Net of a layout, without contents."""
    config = comfy.supported_models.SDXL(koala_loader.unet_config(layout)).unet_config
    return UNetModel(**config, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)


def shallow_share(unet: UNetModel, layout: Layout) -> float:
    """Multiplications of a step on extrapolated features, as a share of a full step's."""
    call = _call(layout, SHARED_AT)
    branches = Branches(unet)
    feature = branches.full(call, {}).feature
    full = _count(partial(_run, unet, layout, SHARED_AT))["total"]
    return _count(lambda: branches.shallow(call, feature, {}))["total"] / full


def _call(layout: Layout, px: int) -> Call:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    # the one attention that has a form for tensors without contents
    options = {"optimized_attention_override": lambda _, *given, **further: attention_pytorch(*given, **further)}
    x = empty(1, layout.in_channels, px // 8, px // 8)
    return Call(x, empty(1), empty(1, 77, layout.context), empty(1, layout.added), None, options)


def _run(unet: UNetModel, layout: Layout, px: int) -> None:
    call = _call(layout, px)
    unet(call.x, call.timesteps, call.context, call.y, transformer_options=call.transformer_options)


def _decode(px: int) -> None:
    with torch.device("meta"):
        AutoencoderKL(**random_weights.VAE).decode(torch.empty(1, 4, px // 8, px // 8))


def _count(work: Callable[[], Any]) -> dict[str, Any]:
    with FlopCounterMode(display=False) as counter:
        work()
    found = counter.get_flop_counts()
    by_operation = {"convolution": 0, "linear": 0, "attention": 0}
    for operation, flops in found["Global"].items():
        by_operation[_kind(str(operation))] += flops // 2
    total = sum(by_operation.values())
    blocks: dict[str, float] = {}
    for place, flops in found.items():  # the host runs a block's layers one by one: blocks themselves are not called
        _, kind, *numbers = place.split(".") if "." in place else (place, "")
        if len(numbers) == LAYERS.get(kind):
            block = ".".join((kind, *numbers[:-1]))
            blocks[block] = blocks.get(block, 0.0) + sum(flops.values()) / 2 / total
    return {"total": total, "by_operation": by_operation, "blocks": blocks}


def _kind(operation: str) -> str:
    if "convolution" in operation:
        return "convolution"
    return "attention" if "bmm" in operation or "attention" in operation else "linear"
