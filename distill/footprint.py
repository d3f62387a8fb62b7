"""How much memory training takes, by part: of one process, calculated from the layouts and the configuration.

``--check`` and the tables of docs/distillation.md are made with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..koala.architecture.keys import parameters, tensors
from ..koala.architecture.layout import Layout
from .config import TrainingTable

TEACHER_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Of a weight, by ``teacher.dtype``. With fp8 the norms stay in bf16: less than a thousandth of all."""
MOMENTS = {"adamw": 8, "adamw-8bit": 2}
"""Bytes of the optimiser's two moments of a weight; 8 bits: and a scale of every 256."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part."""

    teacher: int
    weights: int
    copies: int
    """Of the student's weights, in 16 bits, for computing: all of them under autocast, a few units under FSDP."""
    gradients: int
    moments: int
    average: int
    per_image: int
    """Activations and features of one image."""
    average_on_cpu: int = 0
    """In the memory of the CPU instead."""

    @property
    def fixed(self) -> int:
        """The part that does not grow with the batch."""
        return self.teacher + self.weights + self.copies + self.gradients + self.moments + self.average

    def of(self, batch: int) -> int:
        return self.fixed + batch * self.per_image


def memory(
    table: TrainingTable,
    student: Layout,
    teacher: Layout | None,
    teacher_dtype: str,
    per_image: int,
    gpus: int = 1,
    teacher_gpus: int = 1,
) -> Memory:
    """On each GPU, with the student's states fully sharded over ``gpus`` and the teacher over ``teacher_gpus``.

    Not sharded: the teacher; the student's weights and gradients, the moments, the average, and under autocast copies
    of the weights in 16 bits. Sharded: a share of each, and the gathered units with the student's gradients in 16 bits.
    ``teacher`` is None where the loss needs none.
    """
    weights, each = parameters(student), TEACHER_BYTES[teacher_dtype]
    average = _share(4 * weights, gpus) if table.ema else 0
    whole_copies = 0 if table.precision == "no" else 2 * weights
    return Memory(
        teacher=0
        if teacher is None
        else _share(each * parameters(teacher), teacher_gpus) + (gathered(teacher) if teacher_gpus > 1 else 0),
        weights=_share(4 * weights, gpus),
        copies=2 * gathered(student) if gpus > 1 else whole_copies,
        gradients=_share(4 * weights, gpus),
        moments=_share(MOMENTS[table.optimiser] * weights, gpus),
        average=0 if table.ema_on_cpu else average,
        per_image=per_image,
        average_on_cpu=average if table.ema_on_cpu else 0,
    )


def checkpoint_bytes(table: TrainingTable, weights: int) -> int:
    """Of a checkpoint of a student with so many weights: the weights and the average in fp32, and the moments."""
    return weights * (4 + MOMENTS[table.optimiser] + (4 if table.ema else 0))


def gathered(layout: Layout) -> int:
    """Bytes, in 16 bits, of what FSDP has gathered at a time: the root, and two units: the current one and the next.

    A unit is a residual layer or a transformer block; the root is everything outside of units.
    """
    root, units = fsdp_units(layout)
    return 2 * (root + 2 * max(units.values()))


@cache
def fsdp_units(layout: Layout) -> tuple[int, dict[str, int]]:
    """Number of weights of the root, and of each unit by name."""
    root, units = 0, dict[str, int]()
    for tensor in tensors(layout):
        if found := re.match(r".+\.(resnets|transformer_blocks)\.\d+(?=\.)", tensor.diffusers):
            units[found[0]] = units.get(found[0], 0) + prod(tensor.shape)
        else:
            root += prod(tensor.shape)
    return root, units


def _share(size: int, gpus: int) -> int:
    return -(-size // gpus)


class Saved:
    """Storages that autograd saves, each counted once; referenced, so that no address is used again."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self._held: list[Any] = []

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.bytes:
            self.bytes[storage._cdata] = storage.nbytes()
            self._held.append(storage)
        return tensor

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.add, lambda tensor: tensor)

    def beyond(self, *others: Saved) -> int:
        """Bytes of the storages that are in none of the others."""
        return sum(size for key, size in self.bytes.items() if not any(key in other.bytes for other in others))
