"""``dev.py nodes``: runs every node in every place, and writes docs/core-nodes.md."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from tools import commands
from tools.harness import testhost
from tools.harness.errors import UserError
from tools.measure import history, markdown
from tools.measure.bench import meter
from tools.measure.nodes import runs
from tools.measure.nodes.inputs import host_nodes, reason_left_out
from tools.measure.nodes.runs import ALONE, LEAST_EFFECT, MODELS, PLACES, ROUNDING, SAMPLERS, Place, Run

PAGE = testhost.ROOT / "docs" / "core-nodes.md"
HISTORY = PAGE.with_suffix(".json")
NOT_REACHED = "not reached: the run was stopped before"
Figures = dict[str, Any]
"""Node -> {"reason": text} where it was not run, else {place: ``Run`` as an object}."""


def places() -> list[Place]:
    """Where every node is run: each model, each sampler, alone and on both sides of KOALA Accelerate; and once with
    an empty negative prompt."""
    every = [Place(model, sampler, place) for model in MODELS for sampler in SAMPLERS for place in PLACES]
    return [*every, Place("700M", SAMPLERS[1], PLACES[0], empty_negative=True)]


def key(place: Place) -> str:
    """A place's name in the history."""
    return ", ".join((place.model, place.sampler, place.place, *["empty negative"] * place.empty_negative))


def measure(names: Iterable[str]) -> Figures:
    """Run nodes in every place. Ctrl+C ends it: those that were not reached have that for a reason."""
    found: Figures = {name: {"reason": reason_left_out(name) or NOT_REACHED} for name in names}
    try:
        for name in found:
            if not reason_left_out(name):
                found[name] = _measured(name)
                print(name, *dict.fromkeys(run["outcome"] for run in found[name].values()), sep="\t", flush=True)
    except KeyboardInterrupt:
        print("Stopped. `dev.py nodes --rest` goes on.")
    return found


def not_reached(names: Iterable[str], before: Figures) -> list[str]:
    """The nodes that ``before`` has no figures of, nor a reason why there are none."""
    return [name for name in names if before.get(name, {"reason": NOT_REACHED}).get("reason") == NOT_REACHED]


def _measured(name: str) -> dict[str, Any]:
    made: dict[str, Run] = {}
    for place in places():
        alone = made.get(key(replace(place, place=ALONE)))
        least = ROUNDING if alone and alone.outcome == "no effect" else LEAST_EFFECT
        made[key(place)] = runs.run(name, place, least)
    return {place: _rounded(run) for place, run in made.items()}


def _rounded(run: Run) -> dict[str, Any]:
    return {**asdict(run), "difference": round(run.difference, 4), "rows": round(run.rows, 2)}


def main(arguments: list[str]) -> int:
    """Measure, add to the history, and write the page; with names, only print what comes of these nodes."""
    options = commands.parser("nodes").parse_args(arguments)
    every = host_nodes()
    if unknown := set(options.nodes) - every.keys():
        raise UserError(f"{', '.join(sorted(unknown))}: no node of ComfyUI's that takes and gives a MODEL")
    before: Figures = history.read(HISTORY)[-1]["figures"] if options.rest or options.report else {}
    if not options.report:
        logging.disable(logging.CRITICAL)
        with runs.prepared():
            figures = measure(options.nodes or not_reached(every, before))
        if options.nodes:
            for name, found in figures.items():
                print(name, *(f"  {place}: {made}" for place, made in found.items()), sep="\n")
            return 0
        add({**before, **figures})
    PAGE.write_text(page(history.read(HISTORY)[-1]), "utf-8")
    return 0


def add(figures: Figures) -> None:
    """Add figures of all nodes to the history."""
    history.add(HISTORY, {"machine": meter.machine("cpu"), "figures": figures})


WORDS: dict[str, str] = {
    "works": "works",
    "no effect": "no effect",
    "spoils": "spoils the image",
    "refused": "refused, with a message",
    "error": "ComfyUI's error",
}
ORDER = tuple(WORDS)


def page(entry: Mapping[str, Any]) -> str:
    """The page, of one entry of the history."""
    figures, machine = entry["figures"], entry["machine"]
    run = {name: found for name, found in figures.items() if "reason" not in found}
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, found in run.items():
        rows.setdefault((*(_alone(found, model) for model in MODELS), _accelerated(found), _notes(found)), []).append(
            name
        )
    left_out = [(f"`{name}`", found["reason"]) for name, found in figures.items() if "reason" in found]
    ordered = sorted(rows.items(), key=lambda row: (max(map(_rank, row[0][:2])), row[1]))
    return "\n".join(
        (
            "# ComfyUI's own nodes on KOALA",
            "",
            f"Every node of ComfyUI {machine['versions']['ComfyUI']} that takes and gives a MODEL: {len(run)} were "
            f"run, {len(left_out)} could not be. Written by `python3 dev.py nodes` on {entry['date']}.",
            "",
            "KOALA-700M stands for koala-tiny, which has its layers and draws what it is asked for. KOALA-1B is a "
            "model of its layers, as narrow, with random weights: whether a node changes the result can be seen, "
            "whether for the better cannot. Each node was run by KSampler and by KOALA Sampler, alone, before KOALA "
            "Accelerate and behind it (preset balanced), with the default values of its widgets; those that do nothing "
            "at 1 (model merging, attention multipliers) at 0.5 and 1.2, and two whose values are beyond koala-tiny's "
            "small images (FreSca, HyperTile) at smaller ones. Second models are the same with a LoRA or another last "
            "layer.",
            "",
            "- *works*: the result is another than without the node, and koala-tiny still draws what is asked for",
            "- *no effect*: the result is the same as without the node",
            "- *spoils the image*: koala-tiny does not draw any more what is asked for",
            "- *refused, with a message*: this pack stops the run and says why",
            "",
            *markdown.table(
                ("node", "KOALA-700M", "KOALA-1B", "with KOALA Accelerate", "note"),
                ((", ".join(f"`{name}`" for name in names), *cells) for cells, names in ordered),
            ),
            "",
            "## Not run",
            "",
            *markdown.table(("node", "why"), left_out),
            "",
        )
    )


def _rank(cell: str) -> int:
    return max((at for at, word in enumerate(ORDER) if WORDS[word] in cell), default=0)


def _alone(found: Mapping[str, Any], model: str) -> str:
    """What comes of a node without KOALA Accelerate, by both samplers."""
    outcomes = {sampler: found[key(Place(model, sampler, ALONE))]["outcome"] for sampler in SAMPLERS}
    words = [WORDS[outcome] for outcome in outcomes.values()]
    if len(set(words)) == 1:
        return words[0]
    return "; ".join(f"{sampler}: {word}" for sampler, word in zip(outcomes, words, strict=True))


def _accelerated(found: Mapping[str, Any]) -> str:
    """What is otherwise with KOALA Accelerate."""
    others: dict[str, list[str]] = {}
    every = [Place(model, sampler, place) for model in MODELS for sampler in SAMPLERS for place in PLACES[1:]]
    for place in every:
        outcome = found[key(place)]["outcome"]
        if outcome != found[key(replace(place, place=ALONE))]["outcome"]:
            others.setdefault(WORDS[outcome], []).append(f"{place.model}, {place.sampler}, {place.place.split()[0]} it")
    if not others:
        return "the same"
    return "; ".join(
        word if len(listed) == len(every) else f"{word} ({'; '.join(listed)})" for word, listed in others.items()
    )


def _notes(found: Mapping[str, Any]) -> str:
    """Errors' first lines, further passes through the U-Net, and an empty negative prompt."""
    notes = list(dict.fromkeys(made["said"] for made in found.values() if made["said"]))
    rows = {found[key(Place(model, SAMPLERS[0], ALONE))]["rows"] for model in MODELS} - {0, 2}
    notes += [f"{count:g} {'pass' if count == 1 else 'passes'} a step instead of 2" for count in sorted(rows)]
    empty = found[key(places()[-1])]["outcome"]
    if empty != found[key(replace(places()[-1], empty_negative=False))]["outcome"]:
        images = " and several images at once" if empty == "error" else ""  # as they are sampled there, see runs.py
        notes.append(f"with an empty negative prompt (zeros, KOALA Prompt's *reference*){images}: {WORDS[empty]}")
    return "; ".join(note.replace("|", "\\|").removesuffix(".") for note in notes)
