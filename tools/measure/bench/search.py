"""Better tables for KOALA Accelerate: which of 25 steps are full steps, by local search on koala-tiny's images.

Usage: python3 dev.py bench search --full N [--sampler NAME]. Every better table is printed, as steps and as sigmas for
host/accelerate/plan.py. Noise and prompts are others than the quality section's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from koala_sdxl.host.accelerate.plan import OFF, REUSE, WARMUP_STEPS, Acceleration, Reuse, Table, full_steps
from koala_sdxl.koala.schedule import schedule
from tools.harness.errors import UserError
from tools.harness.testhost import say

Steps = tuple[int, ...]
STEPS = 25
NOISE = 77
PROMPTS = range(216, 432, 6)
WORTH = 0.02  # dB that a better table has to gain: less is noise


def start(full: int, sigmas: Sequence[float], tables: Sequence[Sequence[float]] = ()) -> Steps:
    """A table of so many full steps to begin with: one of ``tables`` (noise levels), or else one spread out.

    ``sigmas``: the noise level at which each step begins. Raises UserError for a number that no table can have.
    """
    for known in tables:
        if len(steps := tuple(sorted(full_steps(sigmas, known)))) == full:
            return steps
    found = tuple(sorted(full_steps(sigmas, sigmas[:1])))  # as few as there can be
    if not len(found) <= full <= len(sigmas):
        raise UserError(f"bench search: --full {full}; expected {len(found)} to {len(sigmas)} steps of {len(sigmas)}.")
    while len(found) < full:
        later = sorted(set(range(len(sigmas))) - set(found), key=lambda step: -min(abs(step - at) for at in found))
        found = next(table for step in later if is_exact(table := tuple(sorted({*found, step})), sigmas))
    return found


def is_exact(table: Steps, sigmas: Sequence[float]) -> bool:
    """Whether the full steps are these and no others, whatever else the pack's rules ask for."""
    return full_steps(sigmas, [sigmas[step] for step in table]) == frozenset(table)


def better(table: Steps, sigmas: Sequence[float], score: Callable[[Steps], float]) -> Iterator[tuple[Steps, float]]:
    """The table, and each better one that moving one step by one leads to, with its score, until none is better."""
    top, tried = score(table), {table}
    yield table, top
    moved = True
    while moved:
        moved = False
        for at in range(len(table) - 1, WARMUP_STEPS - 1, -1):
            for to in (table[at] - 1, table[at] + 1):
                moving = tuple(sorted({*table[:at], to, *table[at + 1 :]}))
                if moving in tried or to not in range(len(sigmas)) or len(moving) < len(table):
                    continue
                tried.add(moving)
                if is_exact(moving, sigmas) and (found := score(moving)) > top + WORTH:
                    table, top, moved = moving, found, True
                    yield table, top
                    break


def run(full: int, sampler: str) -> None:
    """Search for tables of ``full`` full steps and print each better one.

    Raises UserError for an impossible number or sampler.
    """
    require_sampler(sampler)
    sigmas = schedule(STEPS, "leading").sigmas[:-1].tolist()
    first = start(full, sigmas, [table.levels for reuse in REUSE.values() for table in reuse if table.levels])
    for table, psnr in better(first, sigmas, scorer(sampler, sigmas)):
        levels = ", ".join(f"{sigmas[step]:.4g}" for step in table)
        say(f"{psnr:.2f} dB  steps {', '.join(map(str, table))}  sigmas {levels}")


def require_sampler(name: str) -> None:
    """Raise UserError for a sampler that ComfyUI does not have."""
    from tools.measure.bench import engines

    engines.activate("cpu")
    from comfy.samplers import SAMPLER_NAMES

    if name not in SAMPLER_NAMES:
        raise UserError(f"bench search: --sampler {name}; expected one of {', '.join(SAMPLER_NAMES)}.")


def scorer(sampler: str, sigmas: Sequence[float]) -> Callable[[Steps], float]:
    """A function from a table to the mean PSNR of its images, in dB, to those with all steps; starts ComfyUI here."""
    from tools.measure.bench import engines

    engines.activate("cpu")
    import comfy.utils
    import torch

    from koala_sdxl.host.accelerate.patch import accelerate
    from tools.measure.bench.image_quality import Prompts, psnr

    comfy.utils.PROGRESS_BAR_ENABLED = False
    run: dict[str, Any] = {"sampler": sampler, "steps": STEPS, "cfg": 7.5, "spacing": "leading"}
    with torch.inference_mode():
        prompts = Prompts(PROMPTS, NOISE)
        reference = prompts.make(prompts.model, **run)

    def score(table: Steps) -> float:
        levels = tuple(sigmas[step] for step in table)
        with torch.inference_mode():
            settings = Acceleration(OFF, Reuse(Table(levels), Table(levels)))  # no error is too large: tables alone
            made = prompts.make(accelerate(prompts.model, settings, lambda _: None).model, **run)
            return psnr(made.images, reference.images)

    return score
