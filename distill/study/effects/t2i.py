"""A T2I-Adapter for sdxl-tiny: trained on outlines, saved like those for SDXL, and on a U-Net.

Its four features go behind the last layer of each stage and of the middle. That is where diffusers puts them in a KOALA
as well, and KOALA ControlNet in ComfyUI: `dev.py carry` has nothing to learn anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, T2IAdapter
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.tiny.grow import SDXL_TINY

from ..addon_training import CONTROLNET_STAGE, Log, Recipe, Residuals, minimise, outline_loss, save

SCALE = 16
"""An image is so many times as large as the first feature."""


def new_adapter() -> T2IAdapter:
    """An untrained one, of the layers of SDXL's published ones."""
    widths = [*SDXL_TINY.channels, SDXL_TINY.channels[-1]]
    return T2IAdapter(3, widths, num_res_blocks=2, downscale_factor=SCALE, adapter_type="full_adapter_xl")


def train(teacher: StableDiffusionXLPipeline, path: Path, log: Log, recipe: Recipe, seed: int) -> None:
    """Train the one that follows outlines and write it to ``path``, fp16, under diffusers' names."""
    torch.manual_seed(seed)
    adapter = new_adapter()
    loss = outline_loss(teacher, by_adapter(adapter), recipe, seed)
    minimise(loss, adapter.parameters(), recipe, CONTROLNET_STAGE, seed, lambda line: log(f"T2I-Adapter {line}"))
    save(adapter.state_dict(), path)


def by_adapter(adapter: T2IAdapter) -> Residuals:
    """Its features, of hints [n, 3, h, w] in [0, 1]."""
    return lambda hints, *_, **__: {"down_intrablock_additional_residuals": adapter(hints)}


@contextmanager
def on(model: StableDiffusionXLPipeline, path: Path, hints: Tensor) -> Iterator[StableDiffusionXLPipeline]:
    """A pipeline whose U-Net, SDXL's or a KOALA's, has the adapter of a file. ``hints``: RGB, uint8 [n, 3, size, size],
    n the batch; with guidance the U-Net's is twice that."""
    adapter = new_adapter()
    adapter.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    with torch.no_grad():
        features = adapter(hints / 255)

    def added(_: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # as a new list: the U-Net takes them out of it
        residuals = [feature.repeat(len(positional[0]) // len(hints), 1, 1, 1) for feature in features]
        return positional, named | {"down_intrablock_additional_residuals": residuals}

    hook = model.unet.register_forward_pre_hook(added, with_kwargs=True)
    try:
        yield model
    finally:
        hook.remove()
