"""Which steps are computed in full, and which with guidance: the settings of KOALA Accelerate, as data.

Tables are written in noise levels (sigma), so that they fit every scheduler, every number of steps, and image to image,
which begins in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

OFF, EXACT, BF16 = ROUTINES = ("off", "exact", "bf16")
"""On the CPU: ComfyUI's own routines; faster ones for the same sums; bf16, where the processor is faster in it, else
exact."""
ROUNDING = 0.005
"""Schedules that mean the same noise level may differ by this part of it."""
FIRST = 4
"""So many steps of every run are computed in full: at its beginning much changes, wherever it begins."""
BEGINNING = (0.8, 0.65, 0.53)
"""A run that begins below the table, as image to image does, has levels of its own for its beginning: these parts of
the noise level that it begins with, which in a whole run of 25 steps are those of the first four."""
REACH = 4.5
"""A feature is foretold at most so many times as far from the last two steps in full as these are apart, in log sigma:
the trend that it goes by has come to its end there, but for a hundredth."""
WHOLE = (0.0, 1.0)


class Reuse(NamedTuple):
    """Noise levels (sigma), falling, at each of which the next step is computed in full, while those between go by
    foretold deep features; empty: all in full.

    ``multistep`` is for samplers that go by the differences between steps, in which errors weigh more.
    """

    one_step: tuple[float, ...] = ()
    multistep: tuple[float, ...] = ()


NO_REUSE = Reuse()


@dataclass(frozen=True)
class Acceleration:
    """What is done otherwise than ComfyUI does it.

    ``routines``: on the CPU, one of ``ROUTINES``. ``guided``: the part of the noise schedule (0: its beginning, 1: its
    end; ComfyUI's percent) in which the negative prompt is computed; outside of it, only the positive one is, as with
    cfg 1.
    """

    routines: str = EXACT
    reuse: Reuse = NO_REUSE
    guided: tuple[float, float] = WHOLE


def full_steps(sigmas: Sequence[float], full_at: Sequence[float]) -> frozenset[int]:
    """The steps of a run to be computed in full. ``sigmas``: the noise level at which each step begins, falling.

    For each level in the table that the run passes, and in its ``BEGINNING``, the first step at or below it; the
    ``FIRST``; and those beyond ``REACH``.
    """
    if not full_at or not sigmas:
        return frozenset(range(len(sigmas)))
    start = sigmas[0] * (1 + ROUNDING)
    levels = [*full_at, *(part * sigmas[0] for part in BEGINNING)] if start < full_at[0] else full_at
    due = {
        next((step for step, sigma in enumerate(sigmas) if sigma < level * (1 + ROUNDING)), None)
        for level in levels
        if level < start
    }
    full: list[int] = []
    for step, sigma in enumerate(sigmas):
        if len(full) < FIRST or step in due or reach(sigmas[full[-2]], sigmas[full[-1]], sigma) > REACH:
            full.append(step)
    return frozenset(full)


def reach(first: float, second: float, sigma: float) -> float:
    """How far a noise level lies from the second of two, in steps as wide as between them, in log sigma."""
    return math.log(second / sigma) / math.log(first / second)


REUSE: dict[str, Reuse] = {
    "off": NO_REUSE,
    "balanced": Reuse(
        (11.68, 9.338, 7.562, 6.197, 4.298, 3.093, 2.293, 1.519, 0.8952, 0.481, 0.2018, 0.04131),
        (11.68, 9.338, 7.562, 6.197, 5.134, 3.631, 2.655, 1.991, 1.519, 1.168, 0.8952, 0.6726, 0.481, 0.3006, 0.04131),
    ),
    "fast": Reuse(
        (11.68, 9.338, 7.562, 6.197, 4.298, 2.655, 1.519, 0.7789, 0.2018),
        (11.68, 9.338, 7.562, 6.197, 5.134, 3.631, 2.655, 1.991, 1.332, 0.8952, 0.5741, 0.3006, 0.04131),
    ),
}
"""Found on koala-tiny's pictures, one_step by ``python3 dev.py bench search``: of 25 steps 12 and 9 are full, for
multistep 15 and 13. They lie close together at the beginning, where the picture takes its form. docs/benchmarks.md has
what they cost and keep."""

PRESETS: dict[str, Acceleration] = {
    "exact": Acceleration(),
    "balanced": Acceleration(BF16, REUSE["balanced"]),
    "fast": Acceleration(BF16, REUSE["fast"]),
}
