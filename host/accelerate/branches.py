"""A U-Net as a deep branch, which makes the deep feature, and a shallow branch, which makes the output from it.

Both are ComfyUI's own ``UNetModel`` with some of the U-Net's blocks (the same modules, not copies), so that whatever
ComfyUI does inside a U-Net happens in them too. Deep branch, then shallow branch gives the U-Net's output, bit for bit:
the first block runs twice, everything else once. A step that is checked runs the shallow branch once more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel

SHALLOW_BLOCKS = 1
"""Input blocks and output blocks of the shallow branch: the first and the last, 3.6 % of KOALA-700M's multiplications.
The deep feature is what the last output block concatenates with the first input block's output."""


class Call(NamedTuple):
    """The arguments with which ComfyUI calls a ``UNetModel`` and the wrappers around it, in this order."""

    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    y: torch.Tensor | None
    control: Mapping[str, list[torch.Tensor | None]] | None
    transformer_options: dict[str, Any]


class _DeepFeature(torch.nn.Module):
    """Takes the deep branch's place in the shallow one: whatever comes in, the deep feature comes out."""

    value: torch.Tensor | None = None

    def forward(self, computed: torch.Tensor) -> torch.Tensor | None:
        return self.value


class Network(NamedTuple):
    """A ``UNetModel`` or a branch of one, and its name; ``slot`` is where the shallow branch finds the deep feature."""

    name: str
    unet: UNetModel
    slot: _DeepFeature | None = None

    def run(self, call: Call, further: Mapping[str, Any], feature: torch.Tensor | None = None) -> torch.Tensor:
        """Its output, [batch, channels, height, width]. ``feature``: the deep feature, for the shallow branch."""
        if self.slot is not None:
            self.slot.value = feature
        try:
            output: torch.Tensor = self.unet._forward(*call, **further)
        finally:
            if self.slot is not None:
                self.slot.value = None
        return output


class Passed(NamedTuple):
    """The deep feature of a pass, the U-Net's output, and that from another deep feature, if one was given; each
    [batch, channels, height, width]."""

    feature: torch.Tensor
    output: torch.Tensor
    from_other: torch.Tensor | None


Execute = Callable[[Network, Call, Mapping[str, Any], torch.Tensor | None], torch.Tensor]
"""Runs a network with the arguments of ``Network.run``, in one way or another."""


class Branches:
    """The two branches of one ``UNetModel``, which itself is not changed."""

    def __init__(self, unet: UNetModel) -> None:
        self._deep_blocks = len(unet.output_blocks) - SHALLOW_BLOCKS
        deep = _with(unet, output_blocks=unet.output_blocks[:-SHALLOW_BLOCKS], out=torch.nn.Identity())
        slot = _DeepFeature()
        shallow = _with(
            unet,
            input_blocks=unet.input_blocks[:SHALLOW_BLOCKS],
            middle_block=TimestepEmbedSequential(slot),
            output_blocks=unet.output_blocks[-SHALLOW_BLOCKS:],
        )
        self._deep = Network("deep branch", deep)
        self._shallow = Network("shallow branch", shallow, slot)

    def full(
        self,
        call: Call,
        further: Mapping[str, Any],
        execute: Execute = Network.run,
        other: torch.Tensor | None = None,
    ) -> Passed:
        """A whole pass. ``other``: a deep feature of which the output is asked for as well."""
        shallow_call = self._shallow_call(call)  # first: the deep branch pops its residuals off the ControlNet's lists
        feature = execute(self._deep, call, further, None)
        output = None if other is None else execute(self._shallow, again(shallow_call), further, other)
        return Passed(feature, execute(self._shallow, shallow_call, further, feature), output)

    def shallow(
        self, call: Call, feature: torch.Tensor, further: Mapping[str, Any], execute: Execute = Network.run
    ) -> torch.Tensor:
        """The U-Net's output from a given deep feature, both [batch, channels, height, width]."""
        return execute(self._shallow, self._shallow_call(call), further, feature)

    def _shallow_call(self, call: Call) -> Call:
        """The call with the residuals and patches of the shallow branch's blocks.

        ComfyUI takes residuals from the ends of their lists: the first input block's is the last one, the last output
        block's the first.
        """
        control = call.control
        if control is not None:
            inputs, outputs = control.get("input", []), control.get("output", [])
            shallow = max(0, len(outputs) - self._deep_blocks)
            control = {"input": list(inputs[-SHALLOW_BLOCKS:]), "output": list(outputs[:shallow])}
        patches = dict(call.transformer_options.get("patches", {}))
        patches.pop("middle_block_after_patch", None)
        if "output_block_patch" in patches:
            patches["output_block_patch"] = [
                _Renumbered(patch, self._deep_blocks) for patch in patches["output_block_patch"]
            ]
        return call._replace(control=control, transformer_options={**call.transformer_options, "patches": patches})


def again(call: Call) -> Call:
    """A call of which a second one can be made: ComfyUI takes residuals off their lists."""
    return call._replace(control=call.control and {name: list(residuals) for name, residuals in call.control.items()})


@dataclass(frozen=True)
class _Renumbered:
    """An output block's patch that reads the block's number in the complete U-Net."""

    patch: Callable[..., Any]
    offset: int

    def __call__(self, h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> Any:
        name, number = options["block"]
        return self.patch(h, skip, {**options, "block": (name, number + self.offset)})


def _with(unet: UNetModel, **modules: torch.nn.Module) -> UNetModel:
    """The same U-Net with other modules in some places; everything else is shared."""
    branch = copy.copy(unet)
    branch._modules = dict(unet._modules)
    for name, module in modules.items():
        setattr(branch, name, module)
    return branch
