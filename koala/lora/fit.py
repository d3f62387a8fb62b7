"""Changes of weights by least squares: what gives one network's output the change that a LoRA gave another's.

No images and no optimiser: a linearised least-squares problem on given inputs, solved by conjugate gradients on the
normal equations (CGLS: Hestenes and Stiefel, 1952). Stopping early is its regularisation: what the inputs say nothing
about stays as it was at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Changes = dict[str, Tensor]
"""Name of a weight -> what is added to it; or of whatever else an output depends on, such as a LoRA's factors."""
Output = Callable[[Mapping[str, Tensor]], Tensor]
"""A network's output with changes, of any shape."""
Adjoint = Callable[[Changes, Tensor], Changes]
"""The transposed Jacobian of an output at some changes, times a tensor of the output's shape."""
RELATIVE_STEP = 0.01
"""Finite differences: the size of a step relative to the changes themselves. Rounding is 1e-7 of an output, and the
output's curvature over a hundredth of a LoRA is small."""
SHORTEST = 2.0**-10
"""The least part of the way that is tried, where the output is not as linear as the way is long."""
RANDOMISED = 8
"""How many times a rank the smaller side of a matrix is, from which on its SVD is a randomised one."""


@dataclass(frozen=True)
class Fitted:
    """Weight changes, and the sum of squares of what is missing of the wanted output: before, and with them."""

    changes: Changes
    before: float
    after: float


def fit_changes(
    output: Output, start: Changes, wanted: Tensor, iterations: int, adjoint: Adjoint | None = None
) -> Fitted:
    """Weight changes whose output is nearer to ``wanted``, by CGLS on the output linearised at ``start``. Where the
    output with them is farther, as it is not linear, they are half of that, or a quarter, and so on.

    Args:
        output: the network's; differentiable, where no ``adjoint`` is given.
        start: the changes to begin with, such as those that the lineage gives; not all zero.
        wanted: the output that is asked for.
        iterations: of CGLS; fewer stay nearer to ``start``.
        adjoint: of ``output``, where that takes less memory than automatic differentiation of the whole.

    Raises ValueError where an output is not finite or ``start`` is zero.
    """
    adjoint = adjoint or (lambda at, error: _adjoint(output, at, error))
    size = _norm(start)
    if not size:
        raise ValueError("every change to start with is zero; expected at least one that is not.")
    with torch.no_grad():
        here = _finite(output(start))
    missing, found = wanted - here, {name: torch.zeros_like(change) for name, change in start.items()}
    slope = adjoint(start, missing)
    direction, power = slope, _norm(slope) ** 2
    for turn in range(iterations):
        if not power:
            break
        scale = RELATIVE_STEP * size / _norm(direction)
        with torch.no_grad():
            effect = (_finite(output(_sum(start, direction, scale))) - here) / scale
        length = power / float(effect.square().sum())
        found = _sum(found, direction, length)
        if turn + 1 == iterations:
            break
        missing = missing - length * effect
        slope = adjoint(start, missing)
        power, last = _norm(slope) ** 2, power
        direction = _sum(slope, direction, power / last)
    before, factor = (wanted - here).square().sum(), 1.0
    while True:
        changes = _sum(start, found, factor)
        with torch.no_grad():
            after = (wanted - _finite(output(changes))).square().sum()
        if after <= before or factor <= SHORTEST:
            return Fitted(changes, float(before), float(after))
        factor /= 2


def fit_rounds(
    start: Changes, fit: Callable[[Changes], Changes], share: Callable[[Changes], float], rounds: int
) -> tuple[Changes, float, float]:
    """The changes after rounds of least squares, and the shares of the start and of these: as many rounds as each reach
    more than the one before on samples that none learns from. With few samples and many changes the next round would
    learn the samples, not what is behind them.

    Args:
        start: the changes to begin with.
        fit: a round.
        share: what changes reach on samples held out.
        rounds: how many there are at most.
    """
    before = share(start)
    found, best = start, before
    for _ in range(rounds):
        changes = fit(found)
        if not (now := share(changes)) > best:
            break
        found, best = changes, now
    return found, before, best


def reached(wanted: Tensor, found: Tensor, change: Tensor) -> float:
    """The share of a wanted change of an output that is reached, by sums of squares; below zero where it is missed by
    more than without any change.

    Args:
        wanted: the output that is asked for.
        found: the output that there is.
        change: how the output that is asked for differs from that without any change.
    """
    return 1 - float((wanted - found).square().sum() / change.square().sum())


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of two matrices of a rank, as a LoRA stores it: up [out, rank] and down [rank, in].

    Where the rank is far below the matrix's own size, the nearest up to the accuracy of a randomised SVD (Halko et al.,
    2011): seconds instead of minutes for SDXL's largest. The random numbers are the same each time.
    """
    if min(change.shape) > RANDOMISED * rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, columns = torch.svd_lowrank(change, q=2 * rank, niter=4)
            right = columns.T
    else:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def _adjoint(output: Output, at: Changes, error: Tensor) -> Changes:
    with torch.enable_grad():
        leaves = {name: change.detach().requires_grad_() for name, change in at.items()}
        slopes = torch.autograd.grad((output(leaves) * error).sum(), list(leaves.values()))
    return dict(zip(leaves, slopes, strict=True))


def _sum(first: Changes, second: Changes, factor: float) -> Changes:
    return {name: change + factor * second[name] for name, change in first.items()}


def _norm(changes: Changes) -> float:
    return float(torch.stack([change.square().sum() for change in changes.values()]).sum().sqrt())


def _finite(output: Tensor) -> Tensor:
    if not torch.isfinite(output).all():
        raise ValueError("the network's output is not finite; expected numbers. Use fp32, or a lower strength.")
    return output
