"""Tensor names and shapes of a ControlNet of SDXL's family: the U-Net's way down and middle, the way of a control image
to the latent's size, and a 1x1 convolution for each residual.

Sources: diffusers' ``ControlNetModel`` and ComfyUI's ``cldm.ControlNet``, which build the same network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .keys import Shape, Tensor, tensors
from .layout import Layout, blocks

IN_UNET = ("input_blocks.", "middle_block.", "time_embed.", "label_emb.")
"""What the names of the tensors begin with that a ControlNet has from its U-Net; ComfyUI's numbering."""
HINT = ((16, 3), (16, 16), (32, 16), (32, 32), (96, 32), (96, 96), (256, 96))
"""Output and input channels of the convolutions that take a control image from pixels to the latent's size; one more
leads to the U-Net's own channels."""
SKIP, MIDDLE = "controlnet_down_blocks.{}", "controlnet_mid_block"
"""diffusers' names of the convolutions of the residuals: of a skip connection's, by its number, and of the middle's."""


def control_tensors(layout: Layout) -> tuple[Tensor, ...]:
    """Every tensor of the ControlNet for a U-Net of this layout."""
    own = (tensor for tensor in tensors(layout) if tensor.comfy.startswith(IN_UNET))
    return (*own, *_hint(layout), *_outputs(layout))


def output_modules(skips: Iterable[int], middle: bool) -> tuple[str, ...]:
    """diffusers' names of the convolutions of some residuals: of these skip connections, and of the middle."""
    return (*(SKIP.format(skip) for skip in skips), *([MIDDLE] if middle else []))


def _hint(layout: Layout) -> Iterator[Tensor]:
    convolutions = (*HINT, (layout.channels[0], HINT[-1][0]))
    names = ("conv_in", *(f"blocks.{index}" for index in range(len(convolutions) - 2)), "conv_out")
    for at, (name, channels) in enumerate(zip(names, convolutions, strict=True)):
        yield from _convolution(f"controlnet_cond_embedding.{name}", f"input_hint_block.{2 * at}", (*channels, 3, 3))


def _outputs(layout: Layout) -> Iterator[Tensor]:
    widths = (layout.channels[0], *(block.c_out for block in blocks(layout) if block.part == "down"))
    for at, width in enumerate(widths):
        yield from _convolution(SKIP.format(at), f"zero_convs.{at}.0", (width, width, 1, 1))
    yield from _convolution(MIDDLE, "middle_block_out.0", (widths[-1], widths[-1], 1, 1))


def _convolution(diffusers: str, comfy: str, shape: Shape) -> Iterator[Tensor]:
    yield Tensor(f"{diffusers}.weight", f"{comfy}.weight", f"{comfy}.weight", shape)
    yield Tensor(f"{diffusers}.bias", f"{comfy}.bias", f"{comfy}.bias", shape[:1])
