"""Which of an SDXL ControlNet's residuals reach a KOALA's U-Net, and where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import comfy.controlnet
import torch

from koala_sdxl.koala.architecture.layout import KOALA_700M, Layout, blocks
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.nodes.adapt import KoalaControlNet
from tools.measure.transfer.models import conditioning, on_disk, pair, sample, small, unguarded, warnings_of_host
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL


class Residuals(NamedTuple):
    """What a KOALA's U-Net took of an SDXL ControlNet in one pass: how many residuals were added, how many of those to
    the skip connection (or middle block) they belong to, and the warnings of the host."""

    added: int
    right: int
    warnings: int


@cache
def controlnet() -> Any:
    """A small random SDXL ControlNet through core's loader."""
    with on_disk(adapters.controlnet(), "controlnet.safetensors") as path:
        return comfy.controlnet.load_controlnet(str(path))


def hinted(control: Any, side: int = 128, strength: float = 1.0) -> Any:
    """A ControlNet with a random hint, as Apply ControlNet leaves it on the conditioning."""
    hint = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(4))
    return control.copy().set_cond_hint(hint, strength, (0.0, 1.0))


@contextmanager
def residuals_seen(control: Any) -> Iterator[list[dict[str, list[Any]]]]:
    """What a ControlNet hands to the U-Net in each pass, before the U-Net takes it."""
    seen: list[dict[str, list[Any]]] = []
    inner, on_itself = control.get_control, "get_control" in vars(control)

    def recorded(*arguments: Any, **further: Any) -> Any:
        given = inner(*arguments, **further)
        seen.append({key: list(held) for key, held in given.items()})
        return given

    control.get_control = recorded
    try:
        yield seen
    finally:
        del control.get_control
        if on_itself:
            control.get_control = inner


def residuals(koala: Layout, ours: bool) -> Residuals:
    """One pass of a small KOALA with an SDXL ControlNet, by the stock nodes or with KOALA ControlNet between them."""
    _, model = pair(koala)
    origin = lineage(small(koala))
    control = controlnet()
    if ours:
        control = KoalaControlNet.execute(control).result[0]
    control = hinted(control)
    with residuals_seen(control) as seen, warnings_of_host() as said:
        sample(unguarded(model), conditioning(origin.student, control))
    given = seen[0]
    shapes = skip_shapes(origin.student)
    # the U-Net takes residuals from each list's end, the deepest first
    taken = list(zip(reversed(shapes), reversed(given["output"]), strict=False))
    fitting = [residual for shape, residual in taken if tuple(residual.shape[1:]) == shape]
    wanted = sdxl_residuals()
    right = sum(
        torch.equal(residual, wanted["output"][skip])
        for skip, (_, residual) in zip(reversed(origin.skips), taken, strict=False)
    )
    middle = len(given["middle"])
    right += middle if origin.student.middle is not None else 0
    return Residuals(len(fitting) + middle, right, len(said))


@cache
def sdxl_residuals() -> dict[str, list[Any]]:
    """The residuals that SDXL itself gets from the same ControlNet."""
    control = hinted(controlnet())
    with residuals_seen(control) as seen:
        sample(pair(KOALA_700M)[0], conditioning(SMALL_SDXL, control))
    return seen[0]


def skip_shapes(layout: Layout, side: int = 16) -> list[tuple[int, int, int]]:
    """Channels, height and width of each skip connection for a latent of ``side``."""
    shapes = [(layout.channels[0], side, side)]
    for block in blocks(layout):
        if block.part == "down":
            side //= 2 if block.kind == "downsample" else 1
            shapes.append((block.c_out, side, side))
    return shapes
