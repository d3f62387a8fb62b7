"""What became of a LoRA's modules, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..architecture.layout import name
from .plan import STAGES, Outcome, Plan

WORDS: dict[Outcome, str] = {
    "applied": "applied",
    "folded": "folded into a neighbour",
    "removed": "removed with KOALA's missing layers",
    "mismatch": "of another shape",
    "unknown": "unknown",
}
"""Outcome -> words, in the order in which they are listed."""


def summary(plan: Plan, text: str) -> str:
    """What became of a LoRA, for a person, in a few lines. ``text`` tells of its text part."""
    lines = [plan.file]
    if plan.origin:
        lines.append(f"trained on {plan.origin.model}: {plan.origin.evidence}")
        lines.append(f"U-Net on {name(plan.target)}: {_counts(Counter(module.outcome for module in plan.modules))}")
    unknown = [module.name for module in plan.modules if module.outcome == "unknown"]
    if unknown:
        lines.append(f"unknown modules: {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}")
    return "\n".join((*lines, f"text encoders: {text}"))


def report(plan: Plan, text: str) -> str:
    """The summary, and a line for each stage."""
    stages = (f"  {stage}: {_counts(found)}" for stage, found in coverage(plan).items())
    return "\n".join((summary(plan, text), *stages))


def coverage(plan: Plan) -> dict[str, dict[Outcome, int]]:
    """How many modules of each stage had which outcome, in the order of a forward pass."""
    stages = sorted({module.stage for module in plan.modules}, key=STAGES.index)
    return {stage: {outcome: count for outcome in WORDS if (count := plan.count(outcome, stage))} for stage in stages}


def _counts(found: Mapping[Outcome, int]) -> str:
    return ", ".join(f"{found[outcome]} {words}" for outcome, words in WORDS.items() if found.get(outcome))
