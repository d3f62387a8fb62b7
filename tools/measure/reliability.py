"""docs/reliability.md: what ``dev.py fuzz`` and ``dev.py soak`` found last, and which tests show the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.harness import testhost
from tools.measure import history
from tools.measure.bench import meter
from tools.measure.markdown import table

PAGE = testhost.ROOT / "docs" / "reliability.md"
HISTORY = PAGE.with_suffix(".json")
OUTCOMES = ("refused", "loaded", "foreign traceback", "silent difference")


def record(kind: str, figures: Mapping[str, Any]) -> None:
    """Add today's figures to the history, and write the page. ``kind``: "fuzz" or "soak"."""
    history.add(HISTORY, {"kind": kind, "machine": meter.machine("cpu"), "figures": dict(figures)})
    PAGE.write_text(page(history.read(HISTORY)), "utf-8")


def page(entries: Sequence[history.Entry]) -> str:
    """The page, with the newest figures of each kind."""
    newest = {kind: entry for (kind,), entry in history.newest(entries, "kind").items()}
    lines = [
        "# Reliability",
        "",
        "What was tried to make the pack fail, and what came of it. Figures are measured; `docs/reliability.json` has "
        "every run with its machine.",
    ]
    if "fuzz" in newest:
        lines += ["", *_fuzz(newest["fuzz"])]
    if "soak" in newest:
        lines += ["", *_soak(newest["soak"])]
    return "\n".join((*lines, "", *TESTS, ""))


def _fuzz(entry: history.Entry) -> Iterator[str]:
    found = entry["figures"]
    kinds: dict[str, dict[str, int]] = found["kinds"]
    faults = sum(counts.get(outcome, 0) for counts in kinds.values() for outcome in OUTCOMES[2:])
    yield "## Damaged files"
    yield ""
    yield (
        f"`python3 dev.py fuzz --seed {found['seed']} --cases {found['cases']}`, {entry['date']}: {found['cases']:,} "
        f"files and folders of every kind that the pack reads, each damaged in one or two ways (a tensor missing, "
        f"renamed, swapped, of another shape or type, NaN, quantised; a header that is cut, flipped or contradicts "
        f"itself; odd JSON; settings of the scheduler; something else under the file's name). {faults} faults."
    )
    yield ""
    yield from table(
        ("kind", *OUTCOMES),
        ((kind, *(counts.get(outcome, 0) for outcome in OUTCOMES)) for kind, counts in kinds.items()),
    )
    yield ""
    yield (
        "*refused*: this pack's own error, with the file's name in its first line. *loaded*: every loaded tensor is "
        "bit for bit the file's, for a LoRA: every patch has the file's numbers, and the report counts what changed; "
        "the U-Net gets the timesteps of diffusers' scheduler. *foreign traceback*: any other error. *silent "
        "difference*: a load that is not the file's. Case 12 again: `python3 dev.py fuzz --only 12`."
    )


def _soak(entry: history.Entry) -> Iterator[str]:
    found, machine = entry["figures"], entry["machine"]
    yield "## Many prompts"
    yield ""
    yield (
        f"`python3 dev.py soak --prompts {found['prompts']}`, {entry['date']}: {found['prompts']} prompts through one "
        f"server (ComfyUI {machine['versions']['ComfyUI']}, {machine['cpu']}, {machine['cores']} cores) with "
        f"koala-tiny; other prompts, seeds and sizes each time, every third with KOALA Accelerate, every fifth with a "
        f"LoRA; after every 25 all models are freed and loaded again. Memory of the server: {found['warm']:.0f} MB "
        f"after 50 prompts, {found['end']:.0f} MB at the end, {found['most']:.0f} MB at most; a straight line through "
        f"the readings after the first 50 prompts grows by {found['growth']:.1f} MB for 100 prompts."
    )


TESTS = (
    "## Kills, cancels, full disks",
    "",
    "Asserted by tests, on each change:",
    "",
)
