"""Features inside teacher and student: which modules' outputs are compared, and how they are recorded."""

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
"""Key ``loss.place`` -> diffusers names of the modules whose outputs are compared. KOALA's ablation has the first four;
the last is BK-SDM's: the output of each stage."""


class Pair(NamedTuple):
    """A module of the student and the teacher's module from which it came (diffusers names), and its stage."""

    stage: str
    student: str
    teacher: str


def pairs(lineage: Lineage, table: LossTable) -> tuple[Pair, ...]:
    """The modules whose outputs are compared, in the order of the student's tensors.

    Raises UserError for a stage that the teacher does not have, and where nothing is left to compare.
    """
    pattern = PATTERNS[table.place]
    if pattern is None or not table.feature:
        return ()
    stages = dict.fromkeys(_stage(tensor.diffusers) for tensor in tensors(lineage.teacher))
    for key, named in (("stages", table.stages), ("stage_weights", table.stage_weights)):
        if unknown := [stage for stage in named if stage not in stages]:
            known = ", ".join(stage for stage in stages if stage)
            raise UserError(
                f"loss.{key}: {unknown[0]} is not a stage of the teacher; expected some of {known}. Change it."
            )
    modules = (module for tensor in tensors(lineage.student) if (module := _module(pattern, tensor.diffusers)))
    chosen = tuple(
        Pair(_stage(module), module, lineage.ancestor(module))
        for module in dict.fromkeys(modules)
        if _stage(module) in table.stages
    )
    if not chosen:
        raise UserError(
            f"loss.stages: the student has no {table.place} in {', '.join(table.stages) or 'no stage'}; expected a "
            f'stage that has it. Add one, or set loss.place = "none".'
        )
    return chosen


def _module(pattern: re.Pattern[str], tensor: str) -> str | None:
    """The innermost module around a tensor whose full name matches the pattern."""
    words = tensor.split(".")
    names = (".".join(words[:length]) for length in range(len(words) - 1, 0, -1))
    return next((name for name in names if pattern.fullmatch(name)), None)


def _stage(module: str) -> str:
    match = re.match(r"(down_blocks|up_blocks)\.\d+|mid_block", module)
    return match[0] if match else ""


class FeatureRecorder:
    """Records the outputs of named modules of a network while ``recording`` is active.

    Outside of it nothing is kept, so that the second forward pass of gradient checkpointing leaves the first one's
    features alone. torch.compile leaves it out of its graphs: compiled, it would go on filling the dict of the first
    pass.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        self._outputs: dict[str, torch.Tensor] | None = None
        for name in names:
            network.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        @torch.compiler.disable
        def record(_: nn.Module, __: Any, output: Any) -> None:
            if self._outputs is not None:  # a down stage also returns its skip connections
                self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return record

    @contextmanager
    def recording(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield a dict that fills with the modules' outputs, by name."""
        self._outputs = {}
        try:
            yield self._outputs
        finally:
            self._outputs = None
