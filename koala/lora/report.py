"""What became of a LoRA's modules, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ..architecture.layout import name
from ..words import Message, joined, lines, message
from .modules import WORDS, Module, Outcome
from .plan import STAGES, Plan

SHOWN = 3
"""How many modules are named for one reason."""

IN_PICTURES = (2, 91)
"""How many images show an SDXL LoRA's effect on KOALA, for 100 that show it on SDXL: least and most of the LoRAs of
docs/distillation.md, at strength 1."""

STAGE_NAMES = {
    "ends": message("ends"),
    **{f"down {number}": message("down {number}", number=number) for number in (1, 2, 3)},
    "middle": message("middle"),
    **{f"up {number}": message("up {number}", number=number) for number in (1, 2, 3)},
    "unknown": message("unknown"),
}
"""What each stage is called."""


def summary(plan: Plan, text: str) -> Message:
    """What became of a LoRA, for a person, in a few lines. ``text`` tells of its text part."""
    said = [plan.file]
    if plan.origin:
        found = _counts(Counter(module.outcome for module in plan.modules))
        said.append(
            message("trained on {model}: {evidence}", model=plan.origin.model, evidence=plan.origin.evidence),
        )
        said.append(message("U-Net on {model}: {counts}", model=name(plan.target), counts=found))
        said += _way(plan, plan.origin.model)
    if plan.configured:
        said.append(message("strength: alpha and rank as {source} says", source=plan.configured))
    if assumed := sum(module.assumed for module in plan.applied):
        said.append(
            message("strength: alpha is unknown for 1 module, taken to be the rank (scale 1)")
            if assumed == 1
            else message(
                "strength: alpha is unknown for {count} modules, taken to be the rank (scale 1)", count=assumed
            )
        )
    said += _faults((*plan.modules, *plan.text))
    return lines(*said, message("text encoders: {found}", found=text))


def _way(plan: Plan, trained_on: str) -> list[Message]:
    """How the effect comes to the KOALA, and how much of it is to be expected."""
    if plan.learned:
        share = f"{100 * plan.learned.share:.0f} %"
        return [message("learned from {name}: {share} of its change of SDXL", name=plan.learned.name, share=share)]
    if trained_on != "SDXL":
        return []
    least, most = IN_PICTURES
    return [
        message(
            "way: each change on its own layer. In small tests {least} to {most} % as many images then showed the "
            "effect as on SDXL",
            least=least,
            most=most,
        )
    ]


def report(plan: Plan, text: str) -> Message:
    """The summary, and a line for each stage."""
    stages = (
        message("  {stage}: {counts}", stage=STAGE_NAMES[stage], counts=_counts(found))
        for stage, found in coverage(plan).items()
    )
    return lines(summary(plan, text), *stages)


def text_summary(plan: Plan) -> Message:
    """What became of the modules of the text encoders, in words."""
    found = Counter(module.outcome for module in plan.text)
    return _with_others(
        message("{count} of {total} applied", count=found["applied"], total=len(plan.text)), plan, found
    )


def hook_text_summary(plan: Plan) -> Message:
    """The same for hooks, which have yet to be set on text encoders."""
    found = Counter(module.outcome for module in plan.text)
    return _with_others(message("{count} for the CLIP that the hooks are set on", count=found["applied"]), plan, found)


def _with_others(applied: Message, plan: Plan, found: Mapping[Outcome, int]) -> Message:
    """What is said of the modules that are applied, and how many had which other outcome."""
    if not plan.text:
        return message("none")
    rest: dict[Outcome, int] = {outcome: count for outcome, count in found.items() if outcome != "applied"}
    return joined(", ", (applied, *([_counts(rest)] if rest else [])))


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
    faults: list[str] = []
    for (outcome, reason), names in found.items():
        shown: str = ", ".join(names[:SHOWN])
        if len(names) > SHOWN:
            shown = message("{names} and {count} more", names=shown, count=len(names) - SHOWN)
        words = message("unknown modules") if outcome == "unknown" else WORDS[outcome]
        faults.append(
            message("{outcome}: {modules}: {reason}", outcome=words, modules=shown, reason=reason)
            if reason
            else message("{outcome}: {modules}", outcome=words, modules=shown)
        )
    if len(faults) > 2 * SHOWN:
        faults[2 * SHOWN :] = [message("and {count} further faults", count=len(faults) - 2 * SHOWN)]
    return faults


def _counts(found: Mapping[Outcome, int]) -> Message:
    return joined(
        ", ",
        (
            message("{count} {outcome}", count=found[outcome], outcome=words)
            for outcome, words in WORDS.items()
            if found.get(outcome)
        ),
    )
