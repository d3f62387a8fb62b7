"""Layout and numbering of a U-Net, read from its tensors' names and shapes: the other direction of ``keys``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .keys import Numbering, Shape, names
from .layout import Layout

_ENDS: dict[str, tuple[str, str, str]] = {
    "diffusers": ("conv_in.weight", "conv_out.weight", "add_embedding.linear_1.weight"),
    "comfy": ("input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight"),
}
"""Names, in each numbering, of the tensors from which input, output and added channels are read."""


def read_layout(found: Mapping[str, Shape]) -> tuple[Layout, Numbering]:
    """Work out layout and numbering from a U-Net's tensor names and shapes (prefixes already taken off).

    Raises:
        KeyError: a tensor that the layout is read from is missing; the argument is its name.
        ValueError: the names are not those of an SDXL-family U-Net; the argument says what does not fit.
    """
    numbering, stages = _read(found)
    if not all(stages.down) or [len(s) for s in stages.up] != [len(s) + 1 for s in reversed(stages.down)]:
        raise ValueError("its up blocks do not mirror its down blocks")
    layout = _layout(found, numbering, stages, found[_ENDS[numbering][1]][0])
    if numbering == "comfy" and set(found) != set(names(layout, "comfy")):
        script = set(names(layout, "script"))
        if len(script & set(found)) > len(set(names(layout, "comfy")) & set(found)):
            numbering = "script"
    return layout, numbering


def read_control_layout(found: Mapping[str, Shape]) -> tuple[Layout, Numbering]:
    """The same for a ControlNet: the layout of a U-Net whose way down and middle are its own, and whose way up is as
    deep. Raises as ``read_layout`` does."""
    numbering, stages = _read(found)
    if not all(stages.down):
        raise ValueError("a stage without layers")
    up = tuple((depths[-1],) * (len(depths) + 1) for depths in reversed(stages.down))
    return _layout(found, numbering, stages._replace(up=up), Layout().out_channels), numbering


def find_layout(found: Mapping[str, Shape]) -> tuple[Layout, Numbering] | None:
    """As ``read_layout``; None where the names are not those of an SDXL-family U-Net."""
    try:
        return read_layout(found)
    except (KeyError, ValueError, IndexError):
        return None


def guess_numbering(found: Iterable[str]) -> Numbering:
    """``diffusers`` or ``comfy`` by the block names alone (``script`` can only be recognised by the layout).

    Raises ValueError where neither is found.
    """
    for name in found:
        if name.startswith(("down_blocks.", "up_blocks.")):
            return "diffusers"
        if name.startswith(("input_blocks.", "output_blocks.")):
            return "comfy"
    raise ValueError("no U-Net blocks")


class _Stages(NamedTuple):
    channels: Shape
    down: tuple[Shape, ...]
    middle: int | None
    up: tuple[Shape, ...]


def _read(found: Mapping[str, Shape]) -> tuple[Numbering, _Stages]:
    numbering = guess_numbering(found)
    return numbering, _read_diffusers(found) if numbering == "diffusers" else _read_comfy(found)


def _layout(found: Mapping[str, Shape], numbering: Numbering, stages: _Stages, out_channels: int) -> Layout:
    conv_in, _, added = _ENDS[numbering]
    context = next((shape[1] for name, shape in found.items() if name.endswith("attn2.to_k.weight")), None)
    if context is None:
        raise ValueError("no cross-attention")
    return Layout(
        channels=stages.channels,
        down=stages.down,
        middle=stages.middle,
        up=stages.up,
        context=context,
        added=found[added][1],
        in_channels=found[conv_in][1],
        out_channels=out_channels,
    )


def _depths(found: Iterable[str]) -> dict[str, int]:
    """Transformer depth of every attention module: prefix -> number of its transformer blocks."""
    indices: dict[str, set[str]] = defaultdict(set)
    for name in found:
        prefix, mark, rest = name.partition(".transformer_blocks.")
        if mark:
            indices[prefix].add(rest.split(".", 1)[0])
    return {prefix: len(numbers) for prefix, numbers in indices.items()}


def _indices(found: Iterable[str], prefix: str) -> list[int]:
    """The sorted block numbers that follow ``prefix`` in the names."""
    return sorted({int(name[len(prefix) :].split(".", 1)[0]) for name in found if name.startswith(prefix)})


def _middle(depths: Mapping[str, int], found: Iterable[str], block: str, attention: str) -> int | None:
    if not any(name.startswith(block) for name in found):
        return None
    return depths.get(attention, 0)


def _read_diffusers(found: Mapping[str, Shape]) -> _Stages:
    depths = _depths(found)

    def stages(part: str) -> tuple[Shape, ...]:
        return tuple(
            tuple(
                depths.get(f"{part}.{stage}.attentions.{layer}", 0)
                for layer in _indices(found, f"{part}.{stage}.resnets.")
            )
            for stage in _indices(found, f"{part}.")
        )

    down = stages("down_blocks")
    channels = tuple(found[f"down_blocks.{stage}.resnets.0.conv1.weight"][0] for stage in range(len(down)))
    return _Stages(channels, down, _middle(depths, found, "mid_block.", "mid_block.attentions.0"), stages("up_blocks"))


def _read_comfy(found: Mapping[str, Shape]) -> _Stages:
    depths = _depths(found)
    modules = {name.rsplit(".", 1)[0] for name in found}
    channels: list[int] = []
    down: list[list[int]] = [[]]
    for n in _indices(found, "input_blocks.")[1:]:
        if f"input_blocks.{n}.0.op" in modules:
            down.append([])
            continue
        if not down[-1]:
            channels.append(found[f"input_blocks.{n}.0.out_layers.3.weight"][0])
        down[-1].append(depths.get(f"input_blocks.{n}.1", 0))
    up: list[list[int]] = [[]]
    for n in _indices(found, "output_blocks."):
        if f"output_blocks.{n}.0.out_layers.3" in modules:
            up[-1].append(depths.get(f"output_blocks.{n}.1", 0))
        if modules & {f"output_blocks.{n}.1.conv", f"output_blocks.{n}.2.conv"}:
            up.append([])
    return _Stages(
        tuple(channels),
        tuple(map(tuple, down)),
        _middle(depths, found, "middle_block.", "middle_block.1"),
        tuple(map(tuple, up)),
    )
