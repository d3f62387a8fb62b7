"""Figures out of measurements: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import comb
from statistics import median
from typing import NamedTuple

IDENTICAL = 100.0
"""The PSNR in dB, at which it ends, of images that differ by no more than a hundred-thousandth (root mean square)."""


class Spread(NamedTuple):
    """What several measurements of the same thing say."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most. Raises ValueError where nothing was measured."""
    if not values:
        raise ValueError("no measurement; expected at least one")
    return Spread(median(values), min(values), max(values))


def sure(values: Sequence[float]) -> Spread:
    """The median, and between which of the values it lies with a probability of 95 % (order statistics; of fewer than
    six values, between the least and the most). Raises ValueError where nothing was measured."""
    ordered, count = sorted(values), len(values)
    outside = 0
    while 2 * sum(comb(count, i) for i in range(outside + 1)) <= 0.05 * 2**count:
        outside += 1
    outside = max(0, outside - 1)
    return Spread(spread(values).median, ordered[outside], ordered[-1 - outside])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, pair by pair: the two took turns, so that each pair saw the machine in the same mood.

    Raises ValueError where they are not pairs.
    """
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def at_cost(points: Sequence[tuple[float, float]], cost: float) -> float:
    """A curve's value at a cost, on straight lines between its points (cost, value).

    Where points share a cost, the best counts. Beyond an end, that end's value: what gets no cheaper is compared at
    its cheapest. Raises ValueError for a curve without points.
    """
    if not points:
        raise ValueError("a curve without points; expected at least one")
    best: dict[float, float] = {}
    for at, value in points:
        best[at] = max(value, best.get(at, value))
    curve = sorted(best.items())
    if cost <= curve[0][0]:
        return curve[0][1]
    for (before, low), (after, high) in pairwise(curve):
        if cost <= after:
            return low + (high - low) * (cost - before) / (after - before)
    return curve[-1][1]


def bracket(steps: int, cost: float) -> tuple[int, ...]:
    """The whole numbers of steps around a share of ``steps``, at least 1: fewer steps at that cost lie between."""
    below = max(1, int(steps * cost))
    return (below,) if below == steps * cost else (below, min(below + 1, steps))


def is_met(figure: float | Spread, bound: float, at_most: bool) -> bool | None:
    """Whether a figure keeps its bound; None where some measurements of it do and others do not."""
    found = [figure] if isinstance(figure, float | int) else [figure.least, figure.most]
    kept = {value <= bound if at_most else value >= bound for value in found}
    return kept.pop() if len(kept) == 1 else None
