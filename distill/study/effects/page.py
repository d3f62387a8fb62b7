"""The section of docs/distillation.md on what adapters do in pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tools.measure import markdown

from ...carry.settings import PER_DRAWING
from .measure import SDXL, WAYS, WITHOUT
from .table import EFFECTS, FAST

LABELS = {way: way for way in WAYS} | {SDXL: "SDXL with it"}
"""The ways, as they are called on the page."""
SHARES = {"shown": "shown", "near": "near", "plain": "kept"}
"""Likewise what is counted."""
DIGITS = {"near": 1}
"""Of what has some."""
MEAN, KEPT = "mean", "kept"
"""Of the LoRAs."""
PICTURE = "distillation-effect-{}.png"
"""An effect's picture beside the page."""
filled = partial(textwrap.fill, width=120, break_on_hyphens=False)
LORAS = tuple(effect.name for effect in EFFECTS if effect.kind == "LoRA" and effect is not FAST)
READ = """With so few images differences of less than 15 points may be chance; nearness tells smaller ones.

By lineage about four fifths of the effect or more come over of three LoRAs (cyan, tiny, outlined), of the fine-tune, of
the ControlNet and the T2I-Adapter, and next to nothing of two LoRAs (striped, framed). For few steps it brings the
student nearly up to SDXL, but that draws three quarters of these images without a LoRA. Where most of an effect comes
over by lineage, the other ways are within chance of it. Of the frame, *fit* brings back over a third and *refit* nearly
two thirds; both show it where it is not asked for, though prompts to keep were given. Of the stripes *refit* draws
traces: the judge passes 3 of 72 images. In the mean over the seeds *refit* is nearest to SDXL with each adapter that it
was used for; with single seeds not always. How much of the wanted change of the output is reached does not tell what
will show: by lineage it is 70 % for the stripes, which do not show, and 63 % for tiny shapes, which do.

*projection* is ProLoRA's formula on all layers that lineage carries over, whatever their kernels; ProLoRA itself leaves
out layers that are too unlike. Large singular values are those that hold 99 % of a matrix's sum of squares. Images are
farther from SDXL's than by lineage with every adapter, and far fewer show one of the five LoRAs.

The five LoRAs were carried over before, with other prompts from the same lists, fewer of them to keep, and no change
asked of the empty prompt where a prompt to keep leads. SDXL does change there, so that it is asked for by now. *refit*
then had 55 shown and 83 kept instead of 49 and 91, as near to SDXL's images.

On the pair of the section above, distilled in 2000 larger steps on a GPU, the LoRA for cyan showed in 8 of 100 images
by lineage."""
"""What the figures say."""
Rows = Sequence[Mapping[str, Any]]


def effects(data: Mapping[str, Any]) -> str:
    """Adapters trained on sdxl-tiny, in pictures."""
    measured = data["effects"]
    known = {row["effect"] for row in measured["rows"]}
    lines = "\n".join(f"- *{effect.name}*: {effect.teaches}" for effect in EFFECTS if effect.name in known)
    missing = ", ".join(effect.name for effect in EFFECTS if effect.name not in known)
    parts = "\n".join(_of_student(measured, student) for student in measured["distance"])
    return f"""## SDXL's adapters in pictures

Trained on an sdxl-tiny that was grown out of koala-tiny (`train-tiny --grow`: SDXL's layers, those that koala-tiny
lacks at random, then trained on), and carried over to a student that was distilled out of it: *lineage* by KOALA LoRA
Loader's rules, *projection* of the same onto the student's weights by ProLoRA's formula
([arXiv 2506.04244](https://arxiv.org/abs/2506.04244)), *fit* and *refit* by `dev.py carry`. What each teaches:

{lines}

Shares of images are in %, of prompts that none learned from: *shown*, of prompts that ask for the effect, those with it
and with all else that they ask for; *kept*, of prompts that do not, those that are as asked for, with the adapter in
place. *near* is how near the images are to SDXL's with the adapter, from the same noise: PSNR in dB. Mean and standard
deviation over seeds of prompts, noise and samples.

{parts}
Each adapter was trained for minutes: what SDXL shows is the measure, not 100 %.
{READ}
{f"{chr(10)}Not measured: {missing}.{chr(10)}" if missing else ""}"""


def _of_student(measured: Mapping[str, Any], student: str) -> str:
    rows = of_student(measured["rows"], student)
    carried = [one for one in measured["carried"] if one["student"] == student]
    done = [effect.name for effect in EFFECTS if any(row["effect"] == effect.name for row in rows)]
    cells = [[what, name, *(spread(_of(rows, name, way), what) for way in LABELS)] for what in SHARES for name in done]
    table = "\n".join(
        markdown.table(["", "", *LABELS.values()], ([SHARES[what], *row] for what, *row in cells if any(row[1:])))
    )
    training, away = measured["students"][student], round(100 * measured["distance"][student])
    teacher, carry = measured["teacher"], measured["carry"]
    pictures = "\n\n".join(f"![{name}: the same prompts in every way]({PICTURE.format(name)})" for name in done)
    how = f"""sdxl-tiny trained on for {teacher["steps"]} steps of {teacher["batch"]} drawings, the student distilled
out of it in {training["steps"]} steps of {training["batch"]}, learning rate {training["learning_rate"]}. The matrices
and kernels that the two share are {away} % away from sdxl-tiny's (norm of the difference, mean; `dev.py lineage` tells
this of every KOALA). `dev.py carry` took {carry["samples"]} samples to learn from, of
{-(-carry["samples"] // (2 * PER_DRAWING))} images that each network draws, more where there are few steps; for a LoRA
with a word half of these are of prompts to keep. Then {carry["steps"]} steps. {_counts(rows, done)}"""
    return f"""### A student {away} % away from its SDXL

{filled(how)}

{table}

{_means(rows)}{_carried(carried)}{pictures}

*The same prompts and noise in every row, first seed: SDXL with the adapter, the student without it, then the ways of
the table, in its order. Above those of the ControlNet and the T2I-Adapter, what they see.*
"""


def _counts(rows: Rows, names: Sequence[str]) -> str:
    """How many images and seeds there are."""
    seeds = {name: len({row["seed"] for row in rows if row["effect"] == name}) for name in names}
    most, kept = max(seeds.values()), max(row["n_plain"] for row in rows)
    fewer = "".join(f", for {name} {count}" for name, count in seeds.items() if count < most)
    return f"{rows[0]['n']}{f' and {kept}' if kept else ''} images for each of {most} seeds{fewer}."


def _means(rows: Rows) -> str:
    """Over the LoRAs for as many steps as usual; nothing where there is none."""
    means = _mean_of_loras(rows)
    if not means:
        return ""
    told = ", ".join(f"{LABELS[way]} {share:.0f} %" for way, share in means.items())
    ofs = ", ".join(f"{way} {share}" for way, share in _for_hundred(means).items()) or "none"
    return filled(f"Mean of *shown* over the LoRAs: {told}. For 100 images that show one on SDXL: {ofs}.") + "\n\n"


def of_hundred(data: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Effect -> way -> how many images of 100 show it on the distilled student, and on SDXL. Under ``MEAN`` the mean
    over the LoRAs; under ``KEPT`` how many images of prompts that do not ask for a LoRA's effect are as asked for."""
    shares = _of_distilled(data)
    kept = [row for row in of_student(data["effects"]["rows"], "distilled") if row["plain"] is not None]
    shares[KEPT] = {way: mean(row["plain"] for row in kept if row["way"] == way) for way in shares[MEAN]}
    return {name: {way: round(share) for way, share in shown.items()} for name, shown in shares.items()}


def for_hundred(data: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Effect -> way -> how many images show it on the distilled student for 100 that show it on SDXL; under ``MEAN``
    that of the means over the LoRAs."""
    return {name: _for_hundred(shown) for name, shown in _of_distilled(data).items()}


def _of_distilled(data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    rows = of_student(data["effects"]["rows"], "distilled")
    found = {name: _shown(rows, name) for name in dict.fromkeys(row["effect"] for row in rows)}
    return {**found, MEAN: _mean_of_loras(rows)}


def by_lineage(data: Mapping[str, Any]) -> tuple[int, int]:
    """How many images show a LoRA's effect on a student by lineage for 100 that show it on SDXL: least and most, of the
    LoRAs of this section and of that on add-ons."""
    old = {row["row"]: row["all"] for row in data["addons"]["lora"]}
    measured = for_hundred(data)
    shares = [measured[name]["lineage"] for name in LORAS if name in measured]
    shares.append(round(100 * old["student + LoRA, ours"] / old["teacher + LoRA"]))
    return min(shares), max(shares)


def sheets(work: Path, data: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """The pictures of the effects on the distilled student, at the first seed, with their names on the page."""
    names = dict.fromkeys(row["effect"] for row in data["effects"]["rows"]) if "effects" in data else ()
    return [(work / "distilled" / "sheets" / f"{name}-0.png", PICTURE.format(name)) for name in names]


def _carried(carried: Rows) -> str:
    """How long carrying over took, and how much of the wanted change of the U-Net's output is reached."""
    if not carried:
        return ""
    means = {way: mean(one["shares"][way] for one in carried) for way in ("lineage", "fit", "refit")}
    told = ", ".join(f"{100 * share:.0f} % by {way}" for way, share in means.items())
    took = f"Carrying one over took {_minutes(carried, ('refit',))} by *fit* and {_minutes(carried, ())} by *refit*, on"
    reach = "Of the wanted change of the U-Net's output, on held-out samples, they reach"
    return filled(f"{took} one core of a busy machine. {reach} {told} (mean).") + "\n\n"


def _minutes(carried: Rows, without: tuple[str, ...]) -> str:
    found = [sum(took for part, took in one["seconds"].items() if part not in without) / 60 for one in carried]
    return f"{min(found):.0f} to {max(found):.0f} minutes"


def of_student(rows: Rows, student: str) -> Rows:
    """A student's rows, and SDXL's of the same adapters and seeds."""
    own = [row for row in rows if row["student"] == student]
    there = {(row["effect"], row["seed"]) for row in own}
    return [row for row in rows if not row["student"] and (row["effect"], row["seed"]) in there] + own


def _of(rows: Rows, effect: str, way: str) -> Rows:
    return [row for row in rows if row["effect"] == effect and row["way"] == way]


def spread(rows: Rows, what: str) -> str:
    """Mean and standard deviation over the seeds."""
    values = [row[what] for row in rows if row[what] is not None]
    if not values:
        return ""
    digits = DIGITS.get(what, 0)
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _shown(rows: Rows, effect: str) -> dict[str, float]:
    """Way -> share of images that show an effect, mean over the seeds."""
    found = {way: [row["shown"] for row in _of(rows, effect, way)] for way in LABELS if way != WITHOUT}
    return {way: mean(values) for way, values in found.items() if values}


def _mean_of_loras(rows: Rows) -> dict[str, float]:
    """The same, mean over the LoRAs for as many steps as usual; nothing where there is none."""
    each = [found for name in LORAS if (found := _shown(rows, name))]
    return {way: mean(found[way] for found in each) for way in (each[0] if each else ())}


def _for_hundred(shown: Mapping[str, float]) -> dict[str, int]:
    """Shares of every other way than SDXL's, of that; nothing where SDXL shows it in no image."""
    whole = shown.get(SDXL)
    return {way: round(100 * share / whole) for way, share in shown.items() if way != SDXL} if whole else {}
