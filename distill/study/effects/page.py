"""The section of docs/distillation.md on what adapters do in pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tools.measure import markdown

from .table import EFFECTS

LABELS = {
    "SDXL": "SDXL with it",
    "KOALA without": "KOALA without",
    "lineage": "lineage",
    "lineage, 2": "lineage, strength 2",
    "fit": "fit",
    "refit": "refit",
}
"""The ways, as they are called on the page."""
LORAS = tuple(effect.name for effect in EFFECTS if effect.modules)
Rows = Sequence[Mapping[str, Any]]


def effects(data: Mapping[str, Any]) -> str:
    """Adapters trained on sdxl-tiny, in pictures."""
    measured = data["effects"]
    rows: Rows = measured["rows"]
    names = [effect.name for effect in EFFECTS if any(row["effect"] == effect.name for row in rows)]
    tables = [
        markdown.table(
            ["", *LABELS.values()],
            (
                [name, *(spread(_of(rows, name, way), what) for way in LABELS)]
                for name in names
                if has(rows, name, what)
            ),
        )
        for what in ("shown", "plain")
    ]
    means = {way: _mean_of_loras(rows, way) for way in LABELS}
    teaches = {effect.name: effect.teaches for effect in EFFECTS}
    carry, teacher = measured["carry"], measured["teacher"]
    lines = "\n".join(f"- *{name}*: {teaches[name]}" for name in names)
    shown, plain = ("\n".join(table) for table in tables)
    return f"""## SDXL's adapters in pictures

Trained on an sdxl-tiny that was grown out of koala-tiny (`train-tiny --grow`: SDXL's layers, those that koala-tiny
lacks at random, then {teacher["steps"]} steps of {teacher["batch"]} drawings), carried over to koala-tiny: *lineage* by
KOALA LoRA Loader's rules, *fit* and *refit* by `dev.py carry` from {measured["prompts"]} prompts with
{carry["samples"]} samples and {carry["steps"]} steps. What each teaches:

{lines}

Of prompts that ask for the effect, none of them learned from, those whose image shows it with everything else that they
ask for, in %; mean and standard deviation over the draws of prompts, noise and samples where there are several,
{rows[0]["n"]} images each:

{shown}

Mean over the LoRAs that are measured in a way: {", ".join(f"{LABELS[way]} {value}" for way, value in means.items())}.

Of prompts that do not ask for it, with the adapter, those whose image is as asked for, in %:

{plain}

![The same prompts in every way, one adapter below the other](distillation-effects.png)

Carrying one over took {_minutes(measured["carried"], ("refit",))} by *fit* and {_minutes(measured["carried"], ())} by
*refit*, on one core of a busy machine. {_shares(measured["carried"])}
"""


def sheets(work: Path) -> list[Path]:
    """The pictures of every effect, at the first seed."""
    return [work / "sheets" / f"{effect.name}-0.png" for effect in EFFECTS]


def _minutes(carried: Rows, without: tuple[str, ...]) -> str:
    found = [sum(took for part, took in one["seconds"].items() if part not in without) / 60 for one in carried]
    return f"{min(found):.0f} to {max(found):.0f} minutes"


def _shares(carried: Rows) -> str:
    """How much of the wanted change of the U-Net's output is reached."""
    means = {way: mean(one["shares"][way] for one in carried) for way in ("lineage", "fit", "refit")}
    told = ", ".join(f"{100 * share:.0f} % by {way}" for way, share in means.items())
    return f"Of the wanted change of the U-Net's output, on held-out samples, they reach {told} (mean)."


def has(rows: Rows, effect: str, what: str) -> bool:
    """Whether an effect was judged in that respect."""
    return any(row["effect"] == effect and row[what] is not None for row in rows)


def _of(rows: Rows, effect: str, way: str) -> Rows:
    return [row for row in rows if row["effect"] == effect and row["way"] == way]


def spread(rows: Rows, what: str) -> str:
    """Mean and standard deviation over the seeds."""
    values = [row[what] for row in rows if row[what] is not None]
    if not values:
        return ""
    return f"{mean(values):.0f}" + (f" ± {stdev(values):.0f}" if len(values) > 1 else "")


def _mean_of_loras(rows: Rows, way: str) -> str:
    found = [[row["shown"] for row in _of(rows, name, way)] for name in LORAS]
    return _percent(mean(values) for values in found if values)


def _percent(values: Iterable[float]) -> str:
    some = list(values)
    return f"{mean(some):.0f} %" if some else "not measured"
