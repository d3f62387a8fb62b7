"""What became of a LoRA's modules, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ..architecture.layout import name
from .modules import WORDS, Module, Outcome
from .plan import STAGES, Plan

SHOWN = 3
"""How many modules are named for one reason."""


def summary(plan: Plan, text: str) -> str:
    """What became of a LoRA, for a person, in a few lines. ``text`` tells of its text part."""
    lines = [plan.file]
    if plan.origin:
        lines.append(f"trained on {plan.origin.model}: {plan.origin.evidence}")
        lines.append(f"U-Net on {name(plan.target)}: {_counts(Counter(module.outcome for module in plan.modules))}")
    if plan.configured:
        lines.append(f"strength: alpha and rank as {plan.configured} says")
    if assumed := sum(module.assumed for module in plan.applied):
        modules = "module" if assumed == 1 else "modules"
        lines.append(f"strength: alpha is unknown for {assumed} {modules}, taken to be the rank (scale 1)")
    lines += _faults((*plan.modules, *plan.text))
    return "\n".join((*lines, f"text encoders: {text}"))


def report(plan: Plan, text: str) -> str:
    """The summary, and a line for each stage."""
    stages = (f"  {stage}: {_counts(found)}" for stage, found in coverage(plan).items())
    return "\n".join((summary(plan, text), *stages))


def text_summary(plan: Plan) -> str:
    """What became of the modules of the text encoders, in words."""
    if not plan.text:
        return "none"
    found = Counter(module.outcome for module in plan.text)
    rest = _counts({outcome: count for outcome, count in found.items() if outcome != "applied"})
    return f"{found['applied']} of {len(plan.text)} applied{', ' + rest if rest else ''}"


def coverage(plan: Plan) -> dict[str, dict[Outcome, int]]:
    """How many modules of each stage had which outcome, in the order of a forward pass."""
    stages = sorted({module.stage for module in plan.modules}, key=STAGES.index)
    return {stage: {outcome: count for outcome in WORDS if (count := plan.count(outcome, stage))} for stage in stages}


def _faults(modules: Iterable[Module]) -> list[str]:
    """A line for each thing that is wrong with modules, which names the first of them."""
    found: dict[tuple[Outcome, str], list[str]] = {}
    for module in modules:
        if module.reason or module.outcome in ("unknown", "mismatch"):
            found.setdefault((module.outcome, module.reason), []).append(module.name)
    lines = []
    for (outcome, reason), names in found.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        words = f"{outcome} modules" if outcome == "unknown" else WORDS[outcome]
        lines.append(f"{words}: {', '.join(names[:SHOWN])}{more}{': ' + reason if reason else ''}")
    if len(lines) > 2 * SHOWN:
        lines[2 * SHOWN :] = [f"and {len(lines) - 2 * SHOWN} further faults"]
    return lines


def _counts(found: Mapping[Outcome, int]) -> str:
    return ", ".join(f"{found[outcome]} {words}" for outcome, words in WORDS.items() if found.get(outcome))
