"""Tensor names and shapes of a U-Net, derived from its layout, in every numbering that is found in files.

``tensors(layout)`` is the one table: a row per tensor with its diffusers name, its ComfyUI name, the name that
diffusers' SDXL conversion script gives it, and its shape. Renaming, exact coverage and parameter counts follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from math import prod
from typing import Literal, NamedTuple, Protocol, get_args

from .layout import Block, Layout, blocks

Shape = tuple[int, ...]
Numbering = Literal["diffusers", "comfy", "script"]
"""``diffusers``: UNet2DConditionModel. ``comfy``: ComfyUI and the original SDXL code, blocks numbered without gaps.
``script``: convert_diffusers_to_original_sdxl.py, which numbers every U-Net as if it had SDXL's two layers a stage."""

NUMBERINGS: tuple[Numbering, ...] = get_args(Numbering)


class Tensor(NamedTuple):
    """One tensor of a U-Net: its name in each numbering, and its shape."""

    diffusers: str
    comfy: str
    script: str
    shape: Shape


class Module(NamedTuple):
    """One module's name prefix in each numbering."""

    diffusers: str
    comfy: str
    script: str

    def child(self, diffusers: str, comfy: str | None = None) -> Module:
        comfy = diffusers if comfy is None else comfy
        return Module(f"{self.diffusers}{diffusers}", f"{self.comfy}{comfy}", f"{self.script}{comfy}")


class HasShape(Protocol):
    """A tensor, or anything else that has dimensions."""

    @property
    def shape(self) -> Iterable[int]: ...


def shapes_of(state: Mapping[str, HasShape]) -> dict[str, Shape]:
    """The shape of each tensor of a state dict, by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@cache
def tensors(layout: Layout) -> tuple[Tensor, ...]:
    """Every tensor of the layout's U-Net, 584 for KOALA-700M, 790 for KOALA-1B, 1680 for SDXL."""
    return tuple(_unet(layout))


def parameters(layout: Layout) -> int:
    """Number of weights of the layout's U-Net."""
    return sum(prod(tensor.shape) for tensor in tensors(layout))


def names(layout: Layout, numbering: Numbering) -> tuple[str, ...]:
    """All tensor names in one numbering, in the order of ``tensors``."""
    return tuple(getattr(tensor, numbering) for tensor in tensors(layout))


def renaming(layout: Layout, source: Numbering, target: Numbering) -> dict[str, str]:
    """Name in ``source`` -> name in ``target``, one to one over every tensor of the layout."""
    return dict(zip(names(layout, source), names(layout, target), strict=True))


class Coverage(NamedTuple):
    """What a file holds against what its layout asks for; all empty means an exact match."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return not (self.missing or self.extra or self.misshapen)

    def __str__(self) -> str:
        """The faults with their number and their first three names, such as "2 missing (first: a, b)"."""
        listed = (("missing", self.missing), ("extra", self.extra), ("misshapen", self.misshapen))
        return "; ".join(f"{len(names)} {word} (first: {', '.join(names[:3])})" for word, names in listed if names)


def compare(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> Coverage:
    """Compare tensor names and shapes that are found with those that are wanted, both ways."""
    return Coverage(
        missing=tuple(name for name in wanted if name not in found),
        extra=tuple(name for name in found if name not in wanted),
        misshapen=tuple(
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ),
    )


def coverage(layout: Layout, numbering: Numbering, found: Mapping[str, Shape]) -> Coverage:
    """Compare a file's tensor names and shapes with the layout's, both ways."""
    return compare({getattr(tensor, numbering): tensor.shape for tensor in tensors(layout)}, found)


def _unet(layout: Layout) -> Iterator[Tensor]:
    first, time = layout.channels[0], layout.time_width
    root = Module("", "", "")
    yield from _weights(root.child("conv_in", "input_blocks.0.0"), (first, layout.in_channels, 3, 3))
    yield from _weights(root.child("time_embedding.linear_1", "time_embed.0"), (time, first))
    yield from _weights(root.child("time_embedding.linear_2", "time_embed.2"), (time, time))
    yield from _weights(root.child("add_embedding.linear_1", "label_emb.0.0"), (time, layout.added))
    yield from _weights(root.child("add_embedding.linear_2", "label_emb.0.2"), (time, time))
    for block in blocks(layout):
        if block.kind == "resnet":
            yield from _resnet(_resnet_module(block), block, time)
            if block.depth:
                yield from _transformer(_attention_module(block), block, layout.context)
        else:
            yield from _weights(_resampler_module(block, layout), (block.c_out, block.c_in, 3, 3))
    yield from _weights(root.child("conv_norm_out", "out.0"), (first,))
    yield from _weights(root.child("conv_out", "out.2"), (layout.out_channels, first, 3, 3))


def _weights(module: Module, shape: Shape, bias: bool = True) -> Iterator[Tensor]:
    yield Tensor(*module.child(".weight"), shape)
    if bias:
        yield Tensor(*module.child(".bias"), shape[:1])


def _layer_module(block: Block, diffusers: str, slot: int) -> Module:
    """``slot`` is the place inside ComfyUI's block: 0 the residual block, 1 the transformer."""
    if block.part == "middle":
        return Module(f"mid_block.{diffusers}", *[f"middle_block.{block.n + slot}"] * 2)
    if block.part == "down":
        comfy, script = f"input_blocks.{block.n}", f"input_blocks.{3 * block.stage + block.layer + 1}"
    else:
        comfy, script = f"output_blocks.{block.n}", f"output_blocks.{3 * block.stage + block.layer}"
    return Module(f"{block.part}_blocks.{block.stage}.{diffusers}", f"{comfy}.{slot}", f"{script}.{slot}")


def _resnet_module(block: Block) -> Module:
    return _layer_module(block, f"resnets.{block.layer}", 0)


def _attention_module(block: Block) -> Module:
    return _layer_module(block, f"attentions.{block.layer}", 1)


def _resampler_module(block: Block, layout: Layout) -> Module:
    if block.kind == "downsample":
        return Module(
            f"down_blocks.{block.stage}.downsamplers.0.conv",
            f"input_blocks.{block.n}.0.op",
            f"input_blocks.{3 * block.stage + 3}.0.op",
        )
    slot = 2 if layout.up[block.stage][-1] else 1
    return Module(
        f"up_blocks.{block.stage}.upsamplers.0.conv",
        f"output_blocks.{block.n}.{slot}.conv",
        f"output_blocks.{3 * block.stage + 2}.2.conv",
    )


def _resnet(module: Module, block: Block, time: int) -> Iterator[Tensor]:
    yield from _weights(module.child(".norm1", ".in_layers.0"), (block.c_in,))
    yield from _weights(module.child(".conv1", ".in_layers.2"), (block.c_out, block.c_in, 3, 3))
    yield from _weights(module.child(".time_emb_proj", ".emb_layers.1"), (block.c_out, time))
    yield from _weights(module.child(".norm2", ".out_layers.0"), (block.c_out,))
    yield from _weights(module.child(".conv2", ".out_layers.3"), (block.c_out, block.c_out, 3, 3))
    if block.c_in != block.c_out:
        yield from _weights(module.child(".conv_shortcut", ".skip_connection"), (block.c_out, block.c_in, 1, 1))


def _transformer(module: Module, block: Block, context: int) -> Iterator[Tensor]:
    width = block.c_out
    yield from _weights(module.child(".norm"), (width,))
    yield from _weights(module.child(".proj_in"), (width, width))
    for index in range(block.depth):
        inner = module.child(f".transformer_blocks.{index}.")
        for attention, source in (("attn1", width), ("attn2", context)):
            yield from _weights(inner.child(f"{attention}.to_q"), (width, width), bias=False)
            yield from _weights(inner.child(f"{attention}.to_k"), (width, source), bias=False)
            yield from _weights(inner.child(f"{attention}.to_v"), (width, source), bias=False)
            yield from _weights(inner.child(f"{attention}.to_out.0"), (width, width))
        yield from _weights(inner.child("ff.net.0.proj"), (8 * width, width))
        yield from _weights(inner.child("ff.net.2"), (width, 4 * width))
        for norm in ("norm1", "norm2", "norm3"):
            yield from _weights(inner.child(norm), (width,))
    yield from _weights(module.child(".proj_out"), (width, width))
