"""Which SDXL layer each KOALA layer came from, measured on the weights; writes koala/architecture/lineage.py's tables.

Usage: python3 dev.py lineage SDXL KOALA [--out FILE]

A layer that was copied and then trained on still points much the way its origin does, while two layers that have
nothing to do with each other stand at right angles, near enough, in so many dimensions. So each layer of the student
is compared with every layer of the same shape in the teacher's same stage, by the cosine between their matrices and
kernels, each flattened, mean over all of them. Norms and biases are left out: they are alike in all layers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch

from koala_sdxl.koala.architecture import layout
from koala_sdxl.koala.architecture.keys import Shape, tensors
from koala_sdxl.koala.architecture.layout import SDXL, Layout, is_subnetwork
from koala_sdxl.koala.architecture.lineage import KEPT_LAYERS, Lineage, at_widths_of, is_teacher
from koala_sdxl.koala.files import other_models, unet_weights
from koala_sdxl.koala.files.conventions import label
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.files.unet_weights import UNetWeights
from tools import commands
from tools.harness.errors import UserError
from tools.harness.testhost import say

MARGIN = 0.1
"""A row is doubtful where another choice is as good but for this much (``choose``). Random weights stay below 0.02 at
koala-tiny's widths, and the wider the closer to 0."""

ASK = "Give SDXL's U-Net first, then KOALA's: python3 dev.py lineage SDXL KOALA"


# --- choosing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The teacher's layer for each of the student's, and how far each is ahead of any other."""

    chosen: tuple[int, ...]
    margins: tuple[float, ...]
    largest: tuple[int, ...]
    """Where each row's largest cosine is; another than ``chosen`` where these are not in increasing order."""

    @property
    def doubtful(self) -> tuple[bool, ...]:
        return tuple(not margin >= MARGIN for margin in self.margins)  # so that NaN is doubtful


def choose(table: Sequence[Sequence[float]]) -> Choice:
    """Choose a column for each row, columns in strictly increasing order, with the largest sum: each row's largest
    where these are in order.

    A row's margin is what the sum would lose with any other column in that row, in order; at most the cosine
    itself, so that an only choice is not certain if it is unlike.
    """

    def total(way: Sequence[int]) -> float:
        return sum(row[column] for row, column in zip(table, way, strict=True))

    def margin(index: int) -> float:
        others = (total(way) for way in ways if way[index] != chosen[index])
        return min(table[index][chosen[index]], total(chosen) - max(others, default=-math.inf))

    ways = list(combinations(range(len(table[0])), len(table)))
    chosen = max(ways, key=total)
    largest = tuple(max(range(len(row)), key=row.__getitem__) for row in table)
    return Choice(chosen, tuple(map(margin, range(len(table)))), largest)


@dataclass(frozen=True)
class Comparison:
    """Layers of the student (rows) against layers of the teacher (columns), each numbered from 0."""

    rows: str
    columns: str
    table: tuple[tuple[float, ...], ...]
    """Cosines, -1 to 1; minus infinity where the shapes differ."""

    @cached_property
    def choice(self) -> Choice:
        return choose(self.table)


@dataclass(frozen=True)
class Stage:
    """One stage of the student: where its layers came from, and the transformer blocks of its attention modules."""

    part: str
    layers: tuple[Comparison, ...]
    transformers: Mapping[str, Comparison]

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return (*self.layers, *self.transformers.values())


# --- measuring ---------------------------------------------------------------------------------------------------


class UNet(UNetWeights):
    """A U-Net in a file, read one tensor at a time."""

    def direction(self, name: str) -> torch.Tensor:
        """A tensor flattened, of length 1: float32 on the CPU."""
        return torch.nn.functional.normalize(self.tensor(name).float().flatten(), dim=0)

    def matrices(self, module: str) -> tuple[tuple[str, Shape], ...]:
        """The matrices and kernels of a module: name after the module's, and shape."""
        return tuple(
            (tensor.diffusers[len(module) :], tensor.shape)
            for tensor in tensors(self.layout)
            if tensor.diffusers.startswith(f"{module}.") and len(tensor.shape) > 1
        )


def open_unet(path: Path, wanted: str) -> UNet:
    """``koala.files.unet_weights.open_unet``, with UserError where there is no such U-Net."""
    try:
        found = unet_weights.open_unet(path, wanted)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    return UNet(found.path, found.layout, found.names)


def open_pair(teacher: Path, student: Path) -> tuple[UNet, UNet]:
    """SDXL, then a U-Net that may have been cut out of it. Raises UserError where they are something else."""
    sdxl, koala = open_unet(teacher, "SDXL"), open_unet(student, "KOALA")
    if not is_teacher(sdxl.layout):
        raise UserError(f"{label(sdxl.path)} is {_described(sdxl)}; expected SDXL's own U-Net. {ASK}")
    if is_teacher(koala.layout) or not is_subnetwork(koala.layout, sdxl.layout):
        raise UserError(
            f"{label(koala.path)} is {_described(koala)}; expected one with some of SDXL's layers left out, as KOALA. "
            f"{ASK}"
        )
    if _widths(koala.layout) != _widths(sdxl.layout):
        raise UserError(
            f"{label(koala.path)} has widths {_widths(koala.layout)}; expected {_widths(sdxl.layout)} (channels, text, "
            f"added conditioning) as in {label(sdxl.path)}. Give the SDXL that it was cut out of."
        )
    return sdxl, koala


def measure(teacher: UNet, student: UNet) -> Iterator[Stage]:
    """Compare the student with the teacher, stage by stage. In memory at a time, as float32: one tensor of the teacher,
    and the student's of that name from all layers of the stage."""
    teacher_depths = dict(_stages(teacher.layout))
    for part, depths in _stages(student.layout):
        ours, theirs = (_modules(part, "resnets", layers) for layers in (depths, teacher_depths[part]))
        resnets = Comparison(f"{part}.resnets", f"{part}.resnets", _rows(compare(student, teacher, ours, theirs)))
        if any(depths):
            attentions, transformers = _measure_attentions(teacher, student, part, teacher_depths[part], depths)
            yield Stage(part, (resnets, attentions), transformers)
        else:
            yield Stage(part, (resnets,), {})


def _measure_attentions(
    teacher: UNet, student: UNet, part: str, teacher_depths: Shape, depths: Shape
) -> tuple[Comparison, dict[str, Comparison]]:
    """A stage's attention modules, and for each of the student's its blocks against those of the one it came from."""
    modules, theirs = _modules(part, "attentions", depths), _modules(part, "attentions", teacher_depths)
    blocks = _transformer_blocks(modules, depths), _transformer_blocks(theirs, teacher_depths)
    pairs = [rows.split(teacher_depths, dim=1) for rows in compare(student, teacher, *blocks).split(depths)]
    # a module came from the one that has blocks like its own
    alike = torch.tensor([[float(pair.amax(1).mean()) for pair in row] for row in pairs])
    attentions = Comparison(f"{part}.attentions", f"{part}.attentions", _rows(alike))
    return attentions, {
        module: Comparison(f"{module}.transformer_blocks", f"{theirs[origin]}.transformer_blocks", _rows(row[origin]))
        for module, row, origin in zip(modules, pairs, attentions.choice.chosen, strict=True)
    }


def compare(student: UNet, teacher: UNet, ours: Sequence[str], theirs: Sequence[str]) -> torch.Tensor:
    """Mean cosine of each of the student's modules ``ours`` (rows) with each of the teacher's ``theirs`` (columns),
    float32; minus infinity where their shapes differ."""
    cosines = torch.full((len(ours), len(theirs)), -math.inf)
    for matrices in dict.fromkeys(map(student.matrices, ours)):
        rows = [row for row, module in enumerate(ours) if student.matrices(module) == matrices]
        columns = [column for column, module in enumerate(theirs) if teacher.matrices(module) == matrices]
        for column in columns:
            cosines[rows, column] = 0
        for matrix, _ in matrices:
            directions = torch.stack([student.direction(ours[row] + matrix) for row in rows])
            for column in columns:
                cosines[rows, column] += directions @ teacher.direction(theirs[column] + matrix) / len(matrices)
    return cosines


def distance(teacher: UNet, student: UNet, line: Lineage) -> float:
    """How far the student's matrices and kernels are from the teacher's that they came from: norm of the difference, as
    a share of the teacher's norm; mean over all of them."""
    pairs = (
        (student.tensor(own.diffusers).float(), teacher.tensor(its.diffusers).float())
        for own, its in line.tensors
        if len(own.shape) > 1
    )
    return mean(float((own - its).norm() / its.norm()) for own, its in pairs)


def _described(unet: UNet) -> str:
    return other_models.describe({tensor.diffusers: tensor.shape for tensor in tensors(unet.layout)})


def _widths(shape: Layout) -> tuple[tuple[int, ...], int, int]:
    return shape.channels, shape.context, shape.added


def _stages(shape: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each stage's name in diffusers, and the transformer depth of its layers."""
    yield from ((f"down_blocks.{stage}", depths) for stage, depths in enumerate(shape.down))
    if shape.middle:
        yield "mid_block", (shape.middle,)
    yield from ((f"up_blocks.{stage}", depths) for stage, depths in enumerate(shape.up))


def _modules(part: str, kind: str, depths: Sequence[int]) -> list[str]:
    return [f"{part}.{kind}.{layer}" for layer in range(len(depths))]


def _transformer_blocks(modules: Sequence[str], depths: Sequence[int]) -> list[str]:
    return [
        f"{module}.transformer_blocks.{index}"
        for module, depth in zip(modules, depths, strict=True)
        for index in range(depth)
    ]


def _rows(table: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table.tolist()))


# --- reporting ---------------------------------------------------------------------------------------------------


def report(comparison: Comparison) -> Iterator[str]:
    """A comparison as lines of text, the chosen cosines in brackets."""
    choice = comparison.choice
    yield f"{comparison.rows} (rows) against SDXL's {comparison.columns} (columns)"
    yield "".join(["    ", *(f"{column:^8}" for column in range(len(comparison.table[0]))), "   margin"])
    for index, row in enumerate(comparison.table):
        cells = ["-" if value == -math.inf else f"{value:.2f}" for value in row]
        cells[choice.chosen[index]] = f"[{cells[choice.chosen[index]]}]"
        doubt = "  doubtful" if choice.doubtful[index] else ""
        yield "".join([f"{index:>3} ", *(f"{cell:^8}" for cell in cells), f"{choice.margins[index]:9.2f}", doubt])
    if choice.chosen != choice.largest:
        yield f"    The largest cosines, {choice.largest}, are not in increasing order; the choice is the best that is."


def kept_layers(stages: Sequence[Stage]) -> dict[str, tuple[int, ...]]:
    """The row of ``KEPT_LAYERS`` for each direction. Raises UserError where its stages did not keep the same layers."""
    kept = {}
    for direction in KEPT_LAYERS:
        found = {
            comparison.rows: comparison.choice.chosen
            for stage in stages
            for comparison in stage.layers
            if stage.part.startswith(direction)
        }
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{rows} {chosen}" for rows, chosen in found.items())
            raise UserError(
                f"the stages on the way {direction} kept different layers: {listed}; KEPT_LAYERS in "
                f"koala/architecture/lineage.py has one row for all of them. Give it a row for each stage before this "
                f"model is added. Nothing was written."
            )
        kept[direction] = next(iter(found.values()))
    return kept


def kept_transformers(stages: Sequence[Stage]) -> dict[str, tuple[int, ...]]:
    """The rows of ``KEPT_TRANSFORMERS``: attention module -> the teacher's index of each of its blocks."""
    return {module: found.choice.chosen for stage in stages for module, found in stage.transformers.items()}


def literal(student: Layout, layers: Mapping[str, tuple[int, ...]], transformers: Mapping[str, tuple[int, ...]]) -> str:
    """The two tables of ``koala/architecture/lineage.py``, with this one layout, as ruff formats them."""
    wide = at_widths_of(SDXL, student)
    key = next((name for name, value in vars(layout).items() if value == wide), repr(wide))
    rows = "".join(f'        "{module}": {kept},\n' for module, kept in transformers.items())
    ways = ", ".join(f'"{direction}": {kept}' for direction, kept in layers.items())
    return (
        f"KEPT_LAYERS: dict[str, tuple[int, ...]] = {{{ways}}}\n\n"
        f"KEPT_TRANSFORMERS: dict[Layout, dict[str, tuple[int, ...]]] = {{\n    {key}: {{\n{rows}    }},\n}}\n"
    )


def run(teacher: Path, student: Path, out: Path | None) -> None:
    """Measure, print every comparison and then the literal, which is written to ``out``, too, if that is given.

    Raises UserError for wrong files, and where the weights leave a doubt; nothing is written then.
    """
    if out and (out.exists() or not out.parent.is_dir()):
        why = "is there already" if out.exists() else "cannot be written: its folder is not there"
        raise UserError(f"{out} {why}. Give --out a new file in a folder that exists.")
    sdxl, koala = open_pair(teacher, student)
    stages = []
    for stage in measure(sdxl, koala):
        stages.append(stage)
        for comparison in stage.comparisons:
            say("\n".join((*report(comparison), "")))
    rows = [(found.rows, doubt) for stage in stages for found in stage.comparisons for doubt in found.choice.doubtful]
    if doubtful := [name for name, doubt in rows if doubt]:
        raise UserError(
            f"{len(doubtful)} of {len(rows)} rows are doubtful, margin below {MARGIN} (first: in {doubtful[0]}); "
            f"expected none. {label(koala.path)} may not have been cut out of {label(sdxl.path)}: give the SDXL that "
            f"it was. Nothing was written."
        )
    layers, transformers = kept_layers(stages), kept_transformers(stages)
    text = literal(koala.layout, layers, transformers)
    say(text.rstrip())
    if layers == KEPT_LAYERS:
        away = 100 * distance(sdxl, koala, Lineage(koala.layout, transformers))
        say(
            f"\nIts matrices and kernels are {away:.1f} % away from those of SDXL (norm of the difference, mean). "
            f"What LoRAs do on students so far away: docs/distillation.md."
        )
    if out:
        try:
            with out.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(
                f"{out} cannot be written ({error.strerror}); what it was to hold is printed above."
            ) from None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = commands.parser("lineage").parse_args(argv)
    run(arguments.teacher, arguments.student, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
