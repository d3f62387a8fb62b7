"""SDXL's changes of weights projected onto a KOALA's by ProLoRA's formula (arXiv 2506.04244), to compare with.

A matrix has a part that its large singular values span, and the rest. The share of a change inside SDXL's part goes
inside the KOALA's, and the share outside outside; shares that mix the two are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ...carry.weights import Weight

ENERGY = 0.99
"""Share of the sum of squares of a matrix that the singular values hold that count as large."""


def projected(changes: Iterable[tuple[str, Tensor]], sdxl: Weight, koala: Weight) -> Iterator[tuple[str, Tensor]]:
    """Changes by lineage -> the same by projection; of biases and norms as they are.

    Args:
        changes: diffusers' names of the KOALA's parameters, and what is added to each.
        sdxl, koala: the same name -> the weight there; SDXL's is that which the KOALA's came from.
    """
    for name, change in changes:
        yield name, project(change, sdxl(name), koala(name)) if change.ndim > 1 else change


def project(change: Tensor, sdxl: Tensor, koala: Tensor) -> Tensor:
    """One change of a weight, of the shape of all three; a kernel is a matrix of a row for each channel that it
    makes."""
    inside, outside = change.flatten(1).float(), change.flatten(1).float()
    for weight in (sdxl, koala):
        rows, columns = _large(weight.flatten(1).float())
        inside = rows @ (rows.T @ inside @ columns) @ columns.T
        outside = outside - rows @ (rows.T @ outside)
        outside = outside - (outside @ columns) @ columns.T
    return (inside + outside).view_as(change)


def _large(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The directions of the large singular values, as columns: of what a matrix makes, and of what it sees."""
    rows, values, columns = torch.linalg.svd(weight, full_matrices=False)
    energy = values.square().cumsum(0)
    count = int((energy < ENERGY * energy[-1]).sum()) + 1
    return rows[:, :count], columns[:count].T
