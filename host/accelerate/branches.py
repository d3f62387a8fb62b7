"""A U-Net in two halves, cut where little is left to do: the trunk makes the deep feature, the head the output from it.

Both halves are ComfyUI's own ``UNetModel`` with some of the whole one's blocks (the same modules, not copies), so that
everything ComfyUI does inside a U-Net is done in them, too. Head after trunk gives the whole U-Net's output, bit for
bit: the first block runs twice, all else once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel

HEAD_BLOCKS = 1
"""Input blocks and output blocks in the head: the first and the last, 3.6 % of KOALA-700M's multiplications. So the
deep feature is what the last output block joins with the first input block's output."""


class Call(NamedTuple):
    """What ComfyUI calls a ``UNetModel`` with, and hands to wrappers around it, in this order."""

    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    y: torch.Tensor | None
    control: Mapping[str, list[torch.Tensor | None]] | None
    transformer_options: dict[str, Any]


class Halves:
    """The two halves of one ``UNetModel``, which stays as it is."""

    def __init__(self, unet: UNetModel) -> None:
        self._feature = _Feature()
        self._trunk_blocks = len(unet.output_blocks) - HEAD_BLOCKS
        self._trunk = _with(unet, output_blocks=unet.output_blocks[:-HEAD_BLOCKS], out=torch.nn.Identity())
        self._head = _with(
            unet,
            input_blocks=unet.input_blocks[:HEAD_BLOCKS],
            middle_block=TimestepEmbedSequential(self._feature),
            output_blocks=unet.output_blocks[-HEAD_BLOCKS:],
        )

    def whole(self, call: Call, further: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The deep feature, and the U-Net's output; each (batch, channels, height, width) of the latent."""
        head_call = self._for_head(call)  # first: the trunk takes its residuals out of the ControlNet's lists
        feature = self._trunk._forward(*call, **further)
        return feature, self._run_head(head_call, feature, further)

    def head(self, call: Call, feature: torch.Tensor, further: Mapping[str, Any]) -> torch.Tensor:
        """The U-Net's output, from a deep feature that is given."""
        return self._run_head(self._for_head(call), feature, further)

    def _run_head(self, call: Call, feature: torch.Tensor, further: Mapping[str, Any]) -> torch.Tensor:
        self._feature.value = feature
        try:
            return self._head._forward(*call, **further)
        finally:
            self._feature.value = None

    def _for_head(self, call: Call) -> Call:
        """The call with the residuals and patches that belong to the head's blocks.

        ComfyUI takes residuals from the ends of their lists: the first input block's is the last one, the last output
        block's the first.
        """
        control = call.control
        if control is not None:
            given, joined = control.get("input", []), control.get("output", [])
            of_head = max(0, len(joined) - self._trunk_blocks)
            control = {"input": list(given[-HEAD_BLOCKS:]), "output": list(joined[:of_head])}
        patches = dict(call.transformer_options.get("patches", {}))
        patches.pop("middle_block_after_patch", None)
        if "output_block_patch" in patches:
            patches["output_block_patch"] = [
                _Numbered(patch, self._trunk_blocks) for patch in patches["output_block_patch"]
            ]
        return call._replace(control=control, transformer_options={**call.transformer_options, "patches": patches})


class _Feature(torch.nn.Module):
    """Stands for the trunk in the head: whatever comes in, the deep feature comes out."""

    value: torch.Tensor | None = None

    def forward(self, given: torch.Tensor) -> torch.Tensor | None:
        return self.value


@dataclass(frozen=True)
class _Numbered:
    """An output block's patch, told the block's number in the whole U-Net."""

    patch: Any
    before: int

    def __call__(self, h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> Any:
        name, number = options["block"]
        return self.patch(h, skip, {**options, "block": (name, number + self.before)})


def _with(unet: UNetModel, **modules: torch.nn.Module) -> UNetModel:
    """The same U-Net with other modules in some places; all else is shared."""
    half = copy.copy(unet)
    half._modules = dict(unet._modules)
    for name, module in modules.items():
        setattr(half, name, module)
    return half
