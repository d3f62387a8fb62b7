"""The shape of an SDXL-family U-Net, as data: how many layers each stage has and how deep their transformers are.

KOALA is a sub-network of SDXL, so one frozen description serves SDXL, every KOALA and every student cut from SDXL.
Sources: the model card (transformer depths [0,2,10], [0,2,6], [0,2,5]), diffusers' ``UNet2DConditionModel`` and
ComfyUI's ``UNetModel`` (both build the same graph from these numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

HEAD_WIDTH = 64  # every attention head of the SDXL family is 64 channels wide
NORM_GROUPS = 32  # every group norm of the SDXL family, U-Net's and VAE's, has 32 groups
SIZE_IDS = 6 * 256  # width of the six size ids in the added conditioning

BlockKind = Literal["resnet", "downsample", "upsample"]


@dataclass(frozen=True)
class Layout:
    """One U-Net of the SDXL family.

    ``down[s][i]`` is the transformer depth of layer ``i`` of stage ``s`` (0: a residual block without attention);
    ``up`` runs from the deepest stage upwards and has one layer more per stage. ``middle`` is the transformer depth
    of the middle block, or None where there is no middle block. ``context`` is the width of the text context,
    ``added`` the width of the added conditioning (pooled text + six size ids of 256).
    """

    channels: tuple[int, ...] = (320, 640, 1280)
    down: tuple[tuple[int, ...], ...] = ((0, 0), (2, 2), (10, 10))
    middle: int | None = 10
    up: tuple[tuple[int, ...], ...] = ((10, 10, 10), (2, 2, 2), (0, 0, 0))
    context: int = 2048
    added: int = 2816
    in_channels: int = 4
    out_channels: int = 4

    @property
    def time_width(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.channels[0]

    @property
    def pooled(self) -> int:
        """Width of the pooled text embedding: what the six 256-wide size ids leave of ``added``."""
        return self.added - SIZE_IDS


@dataclass(frozen=True)
class Block:
    """One residual layer or resampler of a U-Net, in the order in which a forward pass meets it.

    ``part`` is "down", "middle" or "up"; ``stage`` and ``layer`` are diffusers' indices; ``n`` is ComfyUI's running
    index in ``input_blocks`` / ``middle_block`` / ``output_blocks``. ``depth`` is the transformer's depth, 0 for none.
    """

    kind: BlockKind
    part: Literal["down", "middle", "up"]
    stage: int
    layer: int
    n: int
    c_in: int
    c_out: int
    depth: int = 0


def compact(depth: int, middle: bool) -> Layout:
    """KOALA's cut of SDXL: one layer a stage and ``depth`` transformer blocks in the deepest stage, with or
    without the middle block."""
    return Layout(
        down=((0,), (2,), (depth,)),
        middle=depth if middle else None,
        up=((depth, depth), (2, 2), (0, 0)),
    )


SDXL = Layout()
KOALA_700M = compact(5, middle=False)
KOALA_1B = compact(6, middle=True)
KOALA_1_7B = compact(10, middle=True)
SSD_1B = Layout(down=((0, 0), (2, 2), (4, 4)), middle=0, up=((4, 4, 10), (2, 1, 1), (0, 0, 0)))
VEGA = Layout(down=((0, 0), (1, 1), (2, 2)), middle=0, up=((2, 2, 2), (1, 1, 1), (0, 0, 0)))
KOALA_TINY = replace(KOALA_700M, channels=(32, 64, 128), context=96, added=64 + SIZE_IDS)

KOALA_NAMES: dict[Layout, str] = {
    KOALA_700M: "KOALA-700M",
    KOALA_1B: "KOALA-1B",
    KOALA_1_7B: "KOALA-1.7B",
    KOALA_TINY: "koala-tiny",
}


def blocks(layout: Layout) -> Iterator[Block]:
    """Yield the layout's residual layers and resamplers with their channel counts, in forward order.

    Mirrors the U-Net's skip connections: every output of the down blocks is concatenated once in the up blocks.
    """
    skips = [layout.channels[0]]
    width, n, last = layout.channels[0], 1, len(layout.channels) - 1
    for stage, depths in enumerate(layout.down):
        for layer, depth in enumerate(depths):
            yield Block("resnet", "down", stage, layer, n, width, layout.channels[stage], depth)
            width = layout.channels[stage]
            skips.append(width)
            n += 1
        if stage < last:
            yield Block("downsample", "down", stage, 0, n, width, width)
            skips.append(width)
            n += 1
    if layout.middle is not None:
        yield Block("resnet", "middle", 0, 0, 0, width, width, layout.middle)
        if layout.middle:
            yield Block("resnet", "middle", 0, 1, 2, width, width)
    n = 0
    for stage, depths in enumerate(layout.up):
        c_out = layout.channels[last - stage]
        for layer, depth in enumerate(depths):
            yield Block("resnet", "up", stage, layer, n, width + skips.pop(), c_out, depth)
            width = c_out
            n += 1
        if stage < last:
            yield Block("upsample", "up", stage, 0, n - 1, width, width)


def fault(layout: Layout) -> str:
    """What makes a layout's sizes those of no network; empty where nothing does.

    Group norms need multiples of 32, attention heads of 64, and every stage is a multiple of the first one.
    """
    first = layout.channels[0]
    for width, down, up in zip(layout.channels, layout.down, reversed(layout.up), strict=True):
        deep = max((*down, *up, (layout.middle or 0) if width == layout.channels[-1] else 0))
        step = HEAD_WIDTH if deep else NORM_GROUPS
        if not width or width % step:
            return f"a stage of {width} channels; expected a multiple of {step}"
        if width % first:
            return f"a stage of {width} channels; expected a multiple of the first stage's {first}"
    if not layout.context:
        return "a text context of width 0"
    return "" if layout.pooled > 0 else f"{layout.added} added channels; expected more than the size ids' {SIZE_IDS}"


def is_subnetwork(student: Layout, teacher: Layout = SDXL) -> bool:
    """Whether ``student`` can be cut out of ``teacher`` by removing layers and transformer blocks; widths may differ,
    but not the latent's channels."""

    def fits(small: tuple[tuple[int, ...], ...], big: tuple[tuple[int, ...], ...]) -> bool:
        return len(small) == len(big) and all(
            len(a) <= len(b) and max(a) <= max(b) and (max(a) > 0) == (max(b) > 0)
            for a, b in zip(small, big, strict=True)
        )

    return (
        (student.in_channels, student.out_channels) == (teacher.in_channels, teacher.out_channels)
        and fits(student.down, teacher.down)
        and fits(student.up, teacher.up)
        and (student.middle or 0) <= (teacher.middle or 0)
    )


def name(layout: Layout) -> str:
    """The model's name, or a description for a layout that nobody has published."""
    if layout in KOALA_NAMES:
        return KOALA_NAMES[layout]
    depths = "/".join(str(max(stage)) for stage in layout.down)
    layers = "/".join(str(len(stage)) for stage in layout.down)
    middle = "no middle block" if layout.middle is None else f"middle block depth {layout.middle}"
    return f"custom SDXL sub-network (layers {layers}, depth {depths}, {middle}, {layout.channels[0]} channels)"
