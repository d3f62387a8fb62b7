"""Which steps run the full U-Net, and which with guidance: the settings of KOALA Accelerate, as data.

Tables are written in noise levels (sigma), so that they fit every scheduler, every number of steps, and image to image,
which begins in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

OFF, EXACT, BF16 = ROUTINES = ("off", "exact", "bf16")
"""On the CPU: ComfyUI's own routines; faster ones for the same arithmetic; bf16 where the processor is faster in it,
else exact."""
SIGMA_TOLERANCE = 0.005
"""Schedules that mean the same noise level may differ by this fraction of it."""
WARMUP_STEPS = 4
"""The first steps of every run are full steps: much changes there, at whichever noise level the run begins."""
WARMUP_LEVELS = (0.8, 0.65, 0.53)
"""A run that begins below the table, as image to image does, has full steps at these fractions of its first noise
level, which are those of the first four steps of 25."""
MAX_EXTRAPOLATION = 4.5
"""The largest distance, in log sigma, from the last full step at which a feature is extrapolated; the unit is the
distance between the last two full steps. There the damped trend is within a hundredth of its limit."""
MAX_ERROR_PATCHED = 0.15
"""The largest error of an extrapolation with patches on the U-Net, with which the tables below were not measured: with
0.35, a strong IP-Adapter's images were worse than those of fewer steps."""
FULL_RANGE = (0.0, 1.0)
"""Guidance over the whole noise schedule."""


class Table(NamedTuple):
    """Which steps of a run are full steps; the others reuse cached features.

    ``levels``: noise levels (sigma), falling, at each of which the next step is a full step. Empty: every step is.
    ``max_error``: while extrapolations are farther off, every step is a full step, too; see ``feature_cache.Run``.
    Infinite: they are checked behind patches only.
    """

    levels: tuple[float, ...] = ()
    max_error: float = math.inf


class Reuse(NamedTuple):
    """Tables for samplers that use one step's prediction, and for those that use the differences between several
    steps', where errors weigh more."""

    single_step: Table = Table()
    multistep: Table = Table()


NO_REUSE = Reuse()


@dataclass(frozen=True)
class Acceleration:
    """What differs from ComfyUI's own sampling.

    ``routines``: on the CPU, one of ``ROUTINES``. ``guided``: the range of the noise schedule (0: start, 1: end;
    ComfyUI's percent) in which the negative prompt is computed; outside it only the positive one is, as with cfg 1.
    """

    routines: str = EXACT
    reuse: Reuse = NO_REUSE
    guided: tuple[float, float] = FULL_RANGE


@dataclass(frozen=True)
class Gates:
    """What may change with the noise level within a run.

    ``levels``: noise levels (sigma) at which a patch or a ControlNet begins or ends. ``unknown``: why they are not all
    known; empty if they are. ``patched``: whether the U-Net has patches.
    """

    levels: frozenset[float] = frozenset()
    unknown: str = ""
    patched: bool = False

    def phase(self, sigma: float) -> Hashable:
        """The same for noise levels that no gate lies between; one that is itself a gate's is a phase of its own, as
        some gates include their level and some do not."""
        return sum(level > sigma for level in self.levels), sigma in self.levels


def falls(sigmas: Sequence[float]) -> bool:
    """Whether the noise levels of a run, its end included, are finite and fall from step to step, to 0 at the end at
    most.

    Unsampling's rise, and restarts' fall and rise. Features are reused only where they fall.
    """
    starts = sigmas[:-1]
    return all(first > second for first, second in pairwise(sigmas)) and (
        not starts or (math.isfinite(starts[0]) and starts[-1] > 0 <= sigmas[-1])
    )


def full_steps(sigmas: Sequence[float], levels: Sequence[float]) -> frozenset[int]:
    """The steps of a run that run the full U-Net.

    These are, for each of ``levels`` that the run passes and of its ``WARMUP_LEVELS``, the first step at or below it;
    the ``WARMUP_STEPS``; and those beyond ``MAX_EXTRAPOLATION``. All steps where ``levels`` is empty, or where the run
    does not fall from step to step.

    Args:
        sigmas: the noise level at which each step begins.
        levels: of a ``Table``.
    """
    if not levels or not sigmas or not falls([*sigmas, 0.0]):
        return frozenset(range(len(sigmas)))
    start = sigmas[0] * (1 + SIGMA_TOLERANCE)
    if start < levels[0]:
        levels = [*levels, *(fraction * sigmas[0] for fraction in WARMUP_LEVELS)]
    refresh = {
        next((step for step, sigma in enumerate(sigmas) if sigma < level * (1 + SIGMA_TOLERANCE)), None)
        for level in levels
        if level < start
    }
    full: list[int] = []
    for step, sigma in enumerate(sigmas):
        is_full = len(full) < WARMUP_STEPS or step in refresh
        if is_full or distance(sigmas[full[-2]], sigmas[full[-1]], sigma) > MAX_EXTRAPOLATION:
            full.append(step)
    return frozenset(full)


def distance(first: float, second: float, sigma: float) -> float:
    """How far a noise level is from ``second``, in log sigma, in units of the distance between ``first`` and it."""
    unit = math.log(first / second)
    return math.log(second / sigma) / unit if unit else math.inf


REUSE: dict[str, Reuse] = {
    "off": NO_REUSE,
    "balanced": Reuse(
        Table((11.68, 9.338, 7.562, 6.197, 4.298, 3.093, 2.293, 1.519, 0.8952, 0.481, 0.2018, 0.04131), 0.35),
        Table(
            (
                11.68,
                9.338,
                7.562,
                6.197,
                5.134,
                3.631,
                2.655,
                1.991,
                1.519,
                1.168,
                0.8952,
                0.6726,
                0.481,
                0.3006,
                0.04131,
            ),
            0.1,
        ),
    ),
    "fast": Reuse(
        Table((11.68, 9.338, 7.562, 6.197, 4.298, 2.655, 1.519, 0.7789, 0.2018), 0.35),
        Table(
            (11.68, 9.338, 7.562, 6.197, 5.134, 3.631, 2.655, 1.991, 1.332, 0.8952, 0.5741, 0.3006, 0.04131),
            0.15,
        ),
    ),
}
"""Measured on koala-tiny's images, single_step by ``python3 dev.py bench search``: of 25 steps 12 and 9 are full, for
multistep 15 and 13, if no error is larger: that of most runs is not, that of some grows from step to step, beyond 1,
and would spoil their images. The tables are dense at the start, where the image takes shape. docs/benchmarks.md has
their cost and quality."""

PRESETS: dict[str, Acceleration] = {
    "exact": Acceleration(),
    "balanced": Acceleration(BF16, REUSE["balanced"]),
    "fast": Acceleration(BF16, REUSE["fast"]),
}
