"""Features on the way through teacher and student: which modules' outputs are compared, and how they are taken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..koala.architecture.keys import tensors
from ..koala.architecture.lineage import Lineage
from .config import LossTable, Place
from .errors import UserError

PATTERNS: dict[Place, re.Pattern[str] | None] = {
    "self-attention": re.compile(r".+\.transformer_blocks\.\d+\.attn1"),
    "cross-attention": re.compile(r".+\.transformer_blocks\.\d+\.attn2"),
    "feed-forward": re.compile(r".+\.transformer_blocks\.\d+\.ff"),
    "residual": re.compile(r".+\.resnets\.\d+"),
    "last": re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block"),
    "none": None,
}
"""Where features are taken -> the modules, by their diffusers names, whose output they are. KOALA's ablation has the
first four; the last is BK-SDM's: what a stage hands on."""


class Pair(NamedTuple):
    """A module of the student and the teacher's that it came from (diffusers names), and its stage."""

    stage: str
    student: str
    teacher: str


def pairs(line: Lineage, table: LossTable) -> tuple[Pair, ...]:
    """The modules whose outputs are compared, in the order of the student's tensors.

    Raises UserError for a stage that no U-Net of SDXL's family has, and where nothing is left to compare.
    """
    pattern = PATTERNS[table.place]
    if pattern is None or not table.feature:
        return ()
    stages = dict.fromkeys(_stage(tensor.diffusers) for tensor in tensors(line.teacher))
    for key, named in (("stages", table.stages), ("stage_weights", table.stage_weights)):
        if unknown := [stage for stage in named if stage not in stages]:
            known = ", ".join(stage for stage in stages if stage)
            raise UserError(
                f"loss.{key}: {unknown[0]} is no stage of the teacher; expected some of {known}. Change it."
            )
    found = (matched for tensor in tensors(line.student) if (matched := _owner(pattern, tensor.diffusers)))
    chosen = tuple(
        Pair(_stage(module), module, line.ancestor(module))
        for module in dict.fromkeys(found)
        if _stage(module) in table.stages
    )
    if not chosen:
        raise UserError(
            f"loss.stages: the student has no {table.place} in {', '.join(table.stages) or 'no stage'}; expected a "
            f'stage that has it. Add one, or set loss.place = "none".'
        )
    return chosen


def _owner(pattern: re.Pattern[str], tensor: str) -> str | None:
    """The longest module around a tensor that the pattern matches as a whole."""
    parts = tensor.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((name for name in names if pattern.fullmatch(name)), None)


def _stage(module: str) -> str:
    found = re.match(r"(down_blocks|up_blocks)\.\d+|mid_block", module)
    return found[0] if found else ""


class Taps:
    """Takes what the named modules of a network put out, while it is asked to.

    Outside ``taking`` nothing is kept, so that the second pass of gradient checkpointing leaves the first one's alone.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        self._taken: dict[str, torch.Tensor] | None = None
        for name in names:
            network.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def take(_: nn.Module, __: Any, output: Any) -> None:
            if self._taken is not None:  # a stage on the way down hands on its skips, too
                self._taken[name] = output[0] if isinstance(output, tuple) else output

        return take

    @contextmanager
    def taking(self) -> Iterator[dict[str, torch.Tensor]]:
        """What the modules put out meanwhile, by name."""
        self._taken = {}
        try:
            yield self._taken
        finally:
            self._taken = None
