"""docs/distillation.md and its plots, from the study's stored figures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tools.measure import markdown
from tools.tiny import denoiser

from ..config import PLACES
from . import few_steps, judging, plots, runs, scale_page, store
from .effects import page as effects_page
from .plots import JUDGED, last

DOCS = store.FILE.parent
RECIPE = denoiser.Recipe()
LABELS = {"from nothing": "from scratch"}
"""Run -> its name on the page, where that is another."""
PAPER = {
    "none": 25.53,
    "self-attention": 26.74,
    "cross-attention": 26.11,
    "residual": 26.27,
    "feed-forward": 26.48,
    "last": 26.63,
}
"""KOALA's table 3 (arXiv 2312.04005): HPSv2 of a student by which features were distilled."""
REFERENCES = {
    "teacher": ("the teacher", ":"),
    "before": (
        f"previous koala-tiny, from scratch: {RECIPE.small_steps + RECIPE.steps} steps of {RECIPE.batch}",
        "--",
    ),
}
"""Judgements to which the curves are compared: label and line style."""
LORA_COLUMNS = {
    "cyan": "cyan",
    "share": "cyan of the shape",
    "background": "background",
    "shape": "shape",
    "all": "all three",
}
CONTROL_COLUMNS = {
    "overlap": "overlap",
    "followed": "outline followed",
    "shape": "shape",
    "background": "background",
    "all": "all three",
}
LORA_SHEET = ("teacher", "teacher with LoRA", "student", "student with LoRA by our nodes", "by stock nodes")
CONTROL_SHEET = ("outlines", *(row.replace("LoRA", "ControlNet") for row in LORA_SHEET))
"""Rows of the sheets of images."""
DIGITS = {"overlap": 2}
"""Of a column; others have one."""
Data = Mapping[str, Any]


def computers(data: Data) -> str:
    """The machines of the runs and of the dry run."""
    measured = [run["computer"] for run in (*data["runs"].values(), data.get("dry_run", {})) if "computer" in run]
    names = {
        f"{one['gpu'] + ', ' if one.get('gpu') else ''}{one['cpu']}, {one['cores']} cores, {one['memory'] / 1e9:.0f} GB"
        for one in measured
    }
    return f"Measured on: {'; '.join(sorted(names))}.\n" if names else ""


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and, for more than one value, standard deviation."""
    average = f"{mean(values):.{digits}f}"
    return average if len(values) < 2 else f"{average} ± {stdev(values):.{digits}f}"


def group(data: Data, **wanted: object) -> list[Mapping[str, Any]]:
    """The runs with these settings."""
    return [run for run in data["runs"].values() if all(run[name] == value for name, value in wanted.items())]


def label(run: str) -> str:
    """A run's name on the page."""
    return LABELS.get(run, run)


# --- sections ----------------------------------------------------------------------------------------------------


def family(data: Data) -> str:
    """What the small models are, and how good their teacher is."""
    teacher, recipe = data["teacher"], denoiser.TEACHER
    training = (
        f": {recipe.small_steps} steps of {recipe.batch} images of {recipe.small_size} px, then {recipe.steps} of "
        f"{recipe.size} px"
    )
    return f"""## The small models

**sdxl-tiny** has SDXL's layout (two layers per stage, transformer depths 0, 2, 10, a middle block; 24.2 M weights) at
koala-tiny's width, with koala-tiny's autoencoder and text encoders, and was trained on the same drawings in the same
way{teacher.get("history", training)}. Students have koala-tiny's layout (7.5 M weights).

An image counts as correct if its shape, the shape's colour and the background match the prompt, judged from the pixels;
{judging.PROMPTS} prompts, 25 steps, cfg 7.5. The held-out error is that of the predicted noise, weighted as for
velocity, on {judging.HELD_OUT} drawings not used in training, with the same noise and time steps for every U-Net. The
teacher: all correct {teacher["all"]:.1f} %, shape {teacher["shape"]:.1f} %, colour {teacher["colour"]:.1f} %,
background {teacher["background"]:.1f} %.

Every run: {runs.PICTURES} drawings, batch {runs.BATCH}, AdamW at 1e-3; task, output and feature error each with factor
1; task and output error weighted as for velocity, with weights of at most {runs.WEIGHTING["most_weight"]:g}.
"""


def curves(data: Data) -> str:
    """Distillation against training from scratch."""
    shown = {label(run["name"]): run for run in group(data, group="curve")}
    references = {name: labelled for name, labelled in REFERENCES.items() if name in data}
    plots.curves(
        shown,
        {title: (data[name], style) for name, (title, style) in references.items()},
        DOCS / "distillation-curves.png",
    )
    steps = sorted({int(step) for run in shown.values() for step in run["curve"]})
    rows: list[list[str]] = []
    for what, (title, digits) in JUDGED.items():
        for name, run in shown.items():
            rows.append([name, title, *(f"{run['curve'][str(step)][what]:.{digits}f}" for step in steps)])
    for name, (title, _) in references.items():
        for what, (judged, digits) in JUDGED.items():
            rows.append([title, judged, *[""] * (len(steps) - 1), f"{data[name][what]:.{digits}f}"])
    table = "\n".join(markdown.table(["run", "", *steps], rows))
    return f"""## Distillation compared with training from scratch

*distilled*: cut out of the teacher, all three errors, self-attention features as in KOALA. *distilled, residual*: the
same with features of residual blocks. *from scratch*: random weights, no teacher; the same images and steps, without
the small images with which `train-tiny` begins, whose result is listed as *previous koala-tiny*. The pack's koala-tiny
is now *{runs.STUDENT.name}*. The teacher's own training is not counted. After this many steps:

{table}

![Both measures against training steps](distillation-curves.png)

![The same twelve prompts: the teacher, and the last images of each run](distillation-pictures.png)

*From top to bottom: the teacher, {"; ".join(label(run.name) for run in runs.CURVES)}.*
"""


def places(data: Data) -> str:
    """The ablation: which features, and which transformer blocks."""
    every = {place: group(data, group="place", place=place) for place in PLACES}
    by_place: dict[str, list[Mapping[str, Any]]] = {place: found for place, found in every.items() if found}
    plots.places(by_place, DOCS / "distillation-places.png")
    columns = ["all correct, %", "shape, %", "colour, %", "background, %", "held-out error"]
    features = markdown.table(
        ["features", "seeds", *columns, "feature error", "HPSv2 in the paper"],
        (
            [
                place,
                *_scores(found),
                f"{mean(run['last_errors']['feature'] for run in found):.2f}",
                f"{PAPER[place]:.2f}",
            ]
            for place, found in by_place.items()
        ),
    )
    blocks = markdown.table(
        ["blocks kept", "seeds", *columns],
        (
            [rule, *_scores(found)]
            for rule, found in (
                ("the first 5 of 10", by_place.get("self-attention", [])),
                ("0, 2, 4, 6, 9", group(data, group="layers")),
            )
            if found
        ),
    )
    order = sorted(by_place, key=lambda place: -mean(last(run)["all"] for run in by_place[place]))
    paper = sorted(PAPER, key=PAPER.__getitem__, reverse=True)
    tasks = [run["last_errors"]["task"] for run in group(data, group="place")]
    return "\n".join(
        (
            f"""## Which features to compare

KOALA's table 3 on the small models: {runs.ABLATION[0].steps} steps from the same initial weights, the same data, three
seeds each (mean and standard deviation). *none* has task and output error only. *Feature error*: that term's mean over
the last 50 steps. All terms have factor 1, as in the paper, so that features of large magnitude count more; for
comparison, the task error ended at {min(tasks):.3f} to {max(tasks):.3f}.
""",
            *features,
            "",
            f"From best to worst here: {', '.join(order)}. In the paper: {', '.join(paper)}.",
            "",
            "![Both measures by features, one point per seed](distillation-places.png)",
            "",
            "### First or evenly spread blocks",
            "",
            *blocks,
            "",
        )
    )


def _scores(found: Sequence[Mapping[str, Any]]) -> list[str]:
    scores = [last(run) for run in found]
    cells = [spread([score[what] for score in scores]) for what in ("all", "shape", "colour", "background")]
    return [str(len(found)), *cells, spread([score["held_out"] for score in scores], 4)]


def addons(data: Data) -> str:
    """SDXL's LoRA and ControlNet on a student."""
    measured, run = data["addons"], runs.STUDENT
    tables = {
        kind: "\n".join(
            markdown.table(
                ["", *columns.values()],
                ([row["row"], *(f"{row[name]:.{DIGITS.get(name, 1)}f}" for name in columns)] for row in measured[kind]),
            )
        )
        for kind, columns in (("lora", LORA_COLUMNS), ("controlnet", CONTROL_COLUMNS))
    }
    return f"""## SDXL add-ons on the distilled student

Trained on sdxl-tiny and applied to its student ({run.name}, {run.steps} steps) by the pack's nodes (*ours*), and by
stock nodes, which match layers by name. Changes to layers that KOALA lacks are left out (*ours*), merged into the
nearest kept block (*fold*), or compensated by a higher *strength*.

A LoRA of the attention layers, rank 4, that teaches one more colour word, cyan, trained on the teacher; the prompts are
those above with cyan as the shape's colour. Shares of images in %, and the mean share of cyan in the foreground:

{tables["lora"]}

![Rows: {", ".join(LORA_SHEET)}](distillation-lora.png)

A ControlNet that draws the shape given by an outline, trained on the teacher; the prompts name only a background.
Overlap is the mean intersection over union with the drawing, 0 to 1; shares in %:

{tables["controlnet"]}

![Rows: {", ".join(CONTROL_SHEET)}](distillation-controlnet.png)
"""


def dry_run(data: Data) -> str:
    """Two steps at full size."""
    measured = data["dry_run"]
    errors = ("task", "output", "feature")
    table = "\n".join(
        markdown.table(
            ["step", *(f"{name} error" for name in errors), "seconds", "peak, GB"],
            (
                [f"{row['step']:.0f}", *(f"{row[name]:.4f}" for name in errors), f"{seconds:.0f}", f"{peak:.1f}"]
                for row, seconds, peak in zip(
                    measured["metrics"], measured["seconds"], measured["peak_gb"], strict=True
                )
            ),
        )
    )
    verdict = "the same weights" if measured["same_in_stock_comfyui"] else "DIFFERENT weights"
    return f"""## Two steps at full size

`python -m tools.run koala_sdxl.distill.study.dry_run`, random weights: SDXL in bf16 teaches a KOALA-700M in fp32 at
256 px, one image per step, with gradient checkpointing, on a CPU. Each step is a process of its own: the second resumes
from the first one's checkpoint. This pack and stock ComfyUI load {verdict} from the result. Seconds and peak memory are
those of the process, including startup, caching, checkpoint and result.

{table}
"""


SECTIONS: tuple[tuple[Callable[[Data], bool], Callable[[Data], str]], ...] = (
    (lambda data: "teacher" in data, family),
    (lambda data: len(group(data, group="curve")) > 1, curves),
    (lambda data: bool(group(data, group="place")), places),
    (lambda data: "addons" in data, addons),
    (lambda data: "effects" in data, effects_page.effects),
    (lambda data: "few_steps" in data, few_steps.few_steps),
    (lambda data: "dry_run" in data, dry_run),
    (lambda data: True, lambda data: scale_page.section()),
)
"""Sections of the page: whether there are figures for one, and the function that writes it."""


def text(data: Data) -> str:
    """The page; its plots are written as well."""
    sections = [section(data) for measured, section in SECTIONS if measured(data)]
    missing = [section.__name__.replace("_", " ") for measured, section in SECTIONS if not measured(data)]
    head = """# Distillation, tested

What `python3 dev.py distill` does ([how to use it](../distill/README.md)), measured on models small enough for two CPU
cores, and calculated for the full size. Written by `python3 dev.py distill-study`.

"""
    tail = f"""
## Limits of this study

- The small models draw six shapes in nine colours at {judging.SIZE} px; results may differ for photographs.
- Three seeds show large differences, not small ones: compare the standard deviations.
- Nothing here has been run with SDXL's own weights.
"""
    if missing:
        tail += f"- Not measured yet: {', '.join(missing)}.\n"
    return head + computers(data) + "\n" + "\n".join(sections) + tail


def write(work: Path) -> Path:
    """Add the work folder's new figures to the stored ones, then write the page and its plots; returns the page."""
    store.add_new(work)
    data = store.newest()
    names = ["teacher", *(runs.config(run, work).output.name for run in runs.CURVES)]
    plots.stacked([work / "runs" / f"{name}.png" for name in names], DOCS / "distillation-pictures.png")
    if "addons" in data:
        size, student = data["addons"]["settings"]["size"], Path(data["addons"]["student"]).stem
        for kind in ("lora", "controlnet"):
            sheet = work / "addons" / f"{kind}-{size}-{student}.png"
            if sheet.exists():
                shutil.copy(sheet, DOCS / f"distillation-{kind}.png")
    if (work / "runs" / "few_steps.png").exists():
        shutil.copy(work / "runs" / "few_steps.png", DOCS / "distillation-steps.png")
    for sheet, name in effects_page.sheets(work, data):
        plots.stacked([sheet], DOCS / name)
    path = DOCS / "distillation.md"
    path.write_text(text(data), "utf-8")
    return path
