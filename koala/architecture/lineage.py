"""Which SDXL layer each KOALA layer came from: two tables, and every other relation between the two derived from them.

Sources: the shapes force 9 of the 12 blocks of this map, and BK-SDM's published initialiser, which KOALA builds on,
settles the rest (``up_blocks.i.{resnets,attentions}.1`` come from the teacher's ``.2``, index 0 from index 0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from .keys import Numbering, Tensor, tensors
from .layout import KOALA_1_7B, KOALA_1B, KOALA_700M, SDXL, Block, Layout, blocks, is_subnetwork, name

KEPT_LAYERS: dict[str, tuple[int, ...]] = {"down": (0,), "up": (0, 2)}
"""SDXL's index of each layer that a stage on the way down or up kept, in diffusers' numbering; a stage with as many
layers as SDXL's kept them all."""

KEPT_TRANSFORMERS: dict[Layout, dict[str, tuple[int, ...]]] = {
    KOALA_700M: {
        "down_blocks.1.attentions.0": (0, 1),
        "down_blocks.2.attentions.0": (0, 1, 2, 3, 4),
        "up_blocks.0.attentions.0": (0, 1, 2, 3, 4),
        "up_blocks.0.attentions.1": (0, 1, 2, 3, 4),
        "up_blocks.1.attentions.0": (0, 1),
        "up_blocks.1.attentions.1": (0, 1),
    },
    KOALA_1B: {
        "down_blocks.1.attentions.0": (0, 1),
        "down_blocks.2.attentions.0": (0, 1, 2, 3, 4, 5),
        "mid_block.attentions.0": (0, 1, 2, 3, 4, 5),
        "up_blocks.0.attentions.0": (0, 1, 2, 3, 4, 5),
        "up_blocks.0.attentions.1": (0, 1, 2, 3, 4, 5),
        "up_blocks.1.attentions.0": (0, 1),
        "up_blocks.1.attentions.1": (0, 1),
    },
    KOALA_1_7B: {
        "down_blocks.1.attentions.0": (0, 1),
        "down_blocks.2.attentions.0": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        "mid_block.attentions.0": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        "up_blocks.0.attentions.0": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        "up_blocks.0.attentions.1": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        "up_blocks.1.attentions.0": (0, 1),
        "up_blocks.1.attentions.1": (0, 1),
    },
}
"""SDXL's index of each transformer block that an attention module kept. That 700M and 1B kept the FIRST five and six of
ten is an assumption: shapes cannot tell. `python3 dev.py lineage` measures it on real weights and writes this table."""

KeptTransformers = Mapping[str, tuple[int, ...]]
"""Attention module of a student (diffusers name) -> the teacher's index of each of its transformer blocks."""
BlockId = tuple[str, int]
"""A block as ComfyUI names it while it runs: ("input", 4), ("middle", 0), ("output", 2)."""
Item = TypeVar("Item")

_LAYER = re.compile(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\b")
_TRANSFORMER = re.compile(r"^(.+\.attentions\.\d+)\.transformer_blocks\.(\d+)\b")


@dataclass(frozen=True)
class Lineage:
    """A compact U-Net as it was cut out of one with SDXL's layers and the same widths.

    The layout alone determines ``teacher``, ``blocks``, ``depths``, ``attention_order`` and ``skips``. All else needs
    ``kept_transformers``, and raises ValueError where that is None: unknown.
    """

    student: Layout
    kept_transformers: KeptTransformers | None = None

    @property
    def transformers(self) -> KeptTransformers:
        """The teacher's index of each transformer block, by attention module. Raises ValueError where it is unknown."""
        return self.require_transformers()

    def require_transformers(self) -> KeptTransformers:
        """The same, for who only has to know that it is known."""
        if self.kept_transformers is None:
            known = ", ".join(map(name, KEPT_TRANSFORMERS))
            raise ValueError(
                f"no table says which of SDXL's transformer blocks the {name(self.student)} kept; expected one of "
                f"{known}, or a file whose metadata koala.transformers says it. Without that, LoRAs and attention "
                f"patches made for SDXL cannot be applied to this model; ControlNets can."
            )
        return self.kept_transformers

    @property
    def teacher(self) -> Layout:
        return at_widths_of(self.student, SDXL)

    def ancestor(self, module: str) -> str:
        """The teacher's name of a module or tensor of the student; diffusers names both."""
        origin = _LAYER.sub(
            lambda at: f"{at[1]}_blocks.{at[2]}.{at[3]}.{self._layer(at[1], int(at[2]), int(at[4]))}", module
        )
        if inner := _TRANSFORMER.match(module):
            index = self.transformers[inner[1]][int(inner[2])]
            origin = re.sub(r"transformer_blocks\.\d+", f"transformer_blocks.{index}", origin)
        return origin

    def _layer(self, part: str, stage: int, layer: int) -> int:
        """The teacher's index of a layer of the student's stage."""
        own, whole = (model.down if part == "down" else model.up for model in (self.student, self.teacher))
        return layer if len(own[stage]) == len(whole[stage]) else KEPT_LAYERS[part][layer]

    @cached_property
    def tensors(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Every tensor of the student, each with the teacher's that it came from."""
        whole = {tensor.diffusers: tensor for tensor in tensors(self.teacher)}
        return tuple((tensor, whole[self.ancestor(tensor.diffusers)]) for tensor in tensors(self.student))

    def names(self, numbering: Numbering) -> dict[str, str]:
        """Tensor name in the teacher -> its name in the student, for what was kept."""
        return {getattr(whole, numbering): getattr(part, numbering) for part, whole in self.tensors}

    def cut(self, weights: Mapping[str, Item], numbering: Numbering) -> dict[str, Item]:
        """The student's weights out of the teacher's, same numbering, nothing copied."""
        return {student: weights[teacher] for teacher, student in self.names(numbering).items()}

    @cached_property
    def neighbours(self) -> dict[str, str]:
        """Module of a transformer block that was removed from a kept attention module -> the student's module in the
        nearest block that was kept (of two, the earlier); diffusers names."""
        found = {}
        for part in (tensor.diffusers.rpartition(".")[0] for tensor in tensors(self.student)):
            if inner := _TRANSFORMER.match(part):
                module, index, rest = inner[1], int(inner[2]), part[inner.end() :]
                kept, whole = self.transformers[module], self.ancestor(module)
                for removed in set(range(attention_depths(self.teacher)[whole])) - set(kept):
                    if min(range(len(kept)), key=lambda at: (abs(kept[at] - removed), at)) == index:
                        found[f"{whole}.transformer_blocks.{removed}{rest}"] = part
        return found

    @cached_property
    def blocks(self) -> dict[BlockId, BlockId]:
        """Block of the student while it runs -> the teacher's."""
        whole = {(block.kind, block.part, block.stage, block.layer): block for block in blocks(self.teacher)}
        found: dict[BlockId, BlockId] = {("input", 0): ("input", 0)}
        for block in blocks(self.student):
            layer = block.layer
            if block.kind == "resnet" and block.part in KEPT_LAYERS:
                layer = self._layer(block.part, block.stage, layer)
            found.setdefault(_block_id(block), _block_id(whole[block.kind, block.part, block.stage, layer]))
        return found

    @cached_property
    def depths(self) -> dict[BlockId, int]:
        """Block of the student that has attention -> how many transformer blocks it has, in forward order."""
        return {_block_id(block): block.depth for block in blocks(self.student) if block.depth}

    @cached_property
    def attention(self) -> dict[BlockId, tuple[int, ...]]:
        """Block of the student that has attention -> the teacher's index of each of its transformer blocks."""
        return {_block_id(block): self.transformers[_attention(block)] for block in blocks(self.student) if block.depth}

    @cached_property
    def attention_order(self) -> tuple[int, ...]:
        """For each attention module of the student, in forward order, the teacher's number in the same order."""
        whole = [_block_id(block) for block in blocks(self.teacher) if block.depth]
        return tuple(whole.index(self.blocks[block]) for block in self.depths)

    @cached_property
    def skips(self) -> tuple[int, ...]:
        """For each skip connection of the student, counted on the way down, the teacher's that its residuals come from.

        By consumer: a skip's residual is added where a block on the way up takes it, and the blocks on the way up know
        their teacher's. KOALA: 0, 2, 3, 5, 6, 8.
        """
        takers = {student[1]: teacher[1] for student, teacher in self.blocks.items() if student[0] == "output"}
        last, whole_last = len(takers) - 1, sum(map(len, self.teacher.up)) - 1
        return tuple(whole_last - takers[last - skip] for skip in range(len(takers)))


def lineage(layout: Layout, kept_transformers: KeptTransformers | None = None) -> Lineage:
    """The lineage of a U-Net, at SDXL's widths or at any other.

    ``kept_transformers``: which transformer blocks its file says that it kept. Without it ``KEPT_TRANSFORMERS`` is
    looked up; a layout that is not there either has a ``Lineage`` whose ``kept_transformers`` is None.

    Raises ValueError for a layout that cannot be cut out of SDXL.
    """
    if not is_subnetwork(layout):
        raise ValueError(f"the {name(layout)} cannot be cut out of SDXL; expected SDXL's layers or fewer.")
    return Lineage(layout, kept_transformers or KEPT_TRANSFORMERS.get(at_widths_of(SDXL, layout)))


def is_teacher(layout: Layout) -> bool:
    """True for SDXL's own layers, at any width."""
    return at_widths_of(SDXL, layout) == SDXL


def at_widths_of(model: Layout, layout: Layout) -> Layout:
    """``layout``'s layers at the widths of ``model``."""
    return replace(layout, channels=model.channels, context=model.context, added=model.added)


def attention_depths(layout: Layout) -> dict[str, int]:
    """Attention module (diffusers name) -> how many transformer blocks it has, in forward order."""
    return {_attention(block): block.depth for block in blocks(layout) if block.depth}


def depths_in_teacher(layout: Layout) -> dict[str, int]:
    """Attention module of a student -> how many transformer blocks the teacher's has that it came from."""
    bare = Lineage(layout)
    wholes = attention_depths(bare.teacher)
    return {module: wholes.get(bare.ancestor(module), 0) for module in attention_depths(layout)}


def check_kept(layout: Layout, kept: KeptTransformers) -> None:
    """Check that ``kept`` has for each attention module of a student as many of the teacher's blocks as it has itself,
    in order. Raises ValueError naming the first that does not fit."""
    depths, wholes = attention_depths(layout), depths_in_teacher(layout)
    for module in dict.fromkeys((*depths, *kept)):
        chosen, depth, whole = list(kept.get(module, ())), depths.get(module, 0), wholes.get(module, 0)
        if len(chosen) != depth or chosen != sorted(set(chosen) & set(range(whole))):
            expected = f"{depth} of 0 to {whole - 1} in increasing order" if depth else "no such module"
            raise ValueError(f"{module} is to keep the transformer blocks {chosen}; expected {expected}")


def _attention(block: Block) -> str:
    return (
        "mid_block.attentions.0"
        if block.part == "middle"
        else (f"{block.part}_blocks.{block.stage}.attentions.{block.layer}")
    )


def _block_id(block: Block) -> BlockId:
    if block.part == "middle":
        return "middle", 0
    return {"down": "input", "up": "output"}[block.part], block.n
