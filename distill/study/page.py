"""docs/distillation.md and its plots, out of what the study left."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from PIL import Image

from tools.harness.testhost import ROOT
from tools.tiny import denoiser

from ..config import PLACES
from . import judging, scale_page
from . import runs as study

matplotlib.use("Agg")  # needs no screen

from matplotlib import pyplot

DOCS = ROOT / "docs"
DATA = DOCS / "distillation.json"
RECIPE = denoiser.Recipe()
PAPER = {
    "none": 25.53,
    "self-attention": 26.74,
    "cross-attention": 26.11,
    "residual": 26.27,
    "feed-forward": 26.48,
    "last": 26.63,
}
"""KOALA's table 3 (arXiv 2312.04005): HPSv2 of a student by where its features were taken."""


JUDGED = {"all": ("all right, %", 1), "held_out": ("held-out error", 4)}
"""What of a judgement is shown of each step of a curve: its title, and how many digits of it."""
REFERENCES = {
    "teacher": ("the teacher", ":"),
    "before": (
        f"koala-tiny as it was, from nothing: {RECIPE.small_steps + RECIPE.steps} steps of {RECIPE.batch}",
        "--",
    ),
}
"""What the curves are held against: its name in words, and the style of its line."""


def collect(work: Path) -> dict[str, Any]:
    """All figures of the study, for docs/distillation.json. runs/before.json: the koala-tiny that was in the pack
    before a distilled one took its place, judged as the teacher is; no run makes it again."""
    found: dict[str, Any] = {"runs": study.results(work)}
    for name in (*REFERENCES, "addons", "dry_run"):
        path = work / "runs" / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
    return found


def computers(data: Mapping[str, Any]) -> str:
    """The machines of the runs and of the dry run, in words."""
    found = [run["computer"] for run in (*data["runs"].values(), data.get("dry_run", {})) if "computer" in run]
    told = {
        f"{one['gpu'] + ', ' if one.get('gpu') else ''}{one['cpu']}, {one['cores']} cores, {one['memory'] / 1e9:.0f} GB"
        for one in found
    }
    return f"Measured on: {'; '.join(sorted(told))}.\n" if told else ""


def last(run: Mapping[str, Any]) -> dict[str, float]:
    """The judgement at the end of a run."""
    return run["curve"][str(run["steps"])]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and, of several, standard deviation."""
    told = f"{mean(values):.{digits}f}"
    return told if len(values) < 2 else f"{told} ± {stdev(values):.{digits}f}"


def group(runs: Mapping[str, Any], **wanted: object) -> list[Mapping[str, Any]]:
    """The runs that have these settings."""
    return [run for run in runs.values() if all(run[name] == value for name, value in wanted.items())]


def curves(data: Mapping[str, Any]) -> str:
    """The curves' plot and table."""
    runs = group(data["runs"], group="curve")
    known = {name: shown for name, shown in REFERENCES.items() if name in data}
    figure = pyplot.figure(figsize=(11, 4), layout="constrained")
    for axes, (what, (label, _)) in zip(figure.subplots(1, 2), JUDGED.items(), strict=True):
        for run in runs:
            points = sorted((int(step), score[what]) for step, score in run["curve"].items())
            axes.plot(*zip(*points, strict=True), ".-", label=run["name"])
        for name, (told, style) in known.items():
            axes.axhline(data[name][what], color="#777777", linestyle=style, label=told)
        axes.set(xlabel="training steps", ylabel=label)
        axes.legend()
    figure.savefig(DOCS / "distillation-curves.png", dpi=100)
    pyplot.close(figure)
    steps = sorted({int(step) for run in runs for step in run["curve"]})
    lines = [f"| run | | {' | '.join(map(str, steps))} |", f"|---|---|{'---|' * len(steps)}"]
    for what, (label, digits) in JUDGED.items():
        for run in runs:
            found = (f"{run['curve'][str(step)][what]:.{digits}f}" for step in steps)
            lines.append(f"| {run['name']} | {label} | {' | '.join(found)} |")
    lines += [
        f"| {told} | {label} |{' |' * (len(steps) - 1)} {data[name][what]:.{digits}f} |"
        for name, (told, _) in known.items()
        for what, (label, digits) in JUDGED.items()
    ]
    return "\n".join(lines) + "\n\n![Both against training steps](distillation-curves.png)\n"


def _row(label: str, runs: Sequence[Mapping[str, Any]], *further: str) -> str:
    scores = [last(run) for run in runs]
    cells = [spread([score[what] for score in scores]) for what in ("all", "shape", "colour", "background")]
    error = spread([score["held_out"] for score in scores], 4)
    return f"| {label} | {len(runs)} | " + " | ".join((*cells, error, *further)) + " |"


def ablation(data: Mapping[str, Any]) -> str:
    """The table of places, a plot, and the choice of layers."""
    by_place = {place: group(data["runs"], group="place", place=place) for place in PLACES}
    by_place = {place: runs for place, runs in by_place.items() if runs}
    figure = pyplot.figure(figsize=(11, 4), layout="constrained")
    for axes, (what, (label, _)) in zip(figure.subplots(1, 2), JUDGED.items(), strict=True):
        for at, runs in enumerate(by_place.values()):
            axes.plot([at] * len(runs), [last(run)[what] for run in runs], "o", color="#2f6f4f", alpha=0.6)
        axes.set_xticks(range(len(by_place)), by_place, rotation=20)
        axes.set(ylabel=label, title="a point for each seed")
    figure.savefig(DOCS / "distillation-places.png", dpi=100)
    pyplot.close(figure)
    columns = "| all right, % | shape, % | colour, % | background, % | held-out error |"
    rule = "|---|---|---|---|---|---|---|"
    order = sorted(by_place, key=lambda place: -mean(last(run)["all"] for run in by_place[place]))
    paper = sorted(PAPER, key=PAPER.__getitem__, reverse=True)
    lines = [f"| features | seeds {columns} feature error | the paper's HPSv2 |", f"{rule}---|---|"]
    lines += [
        _row(place, runs, f"{mean(run['last_errors']['feature'] for run in runs):.2f}", f"{PAPER[place]:.2f}")
        for place, runs in by_place.items()
    ]
    lines += [
        "",
        f"Best first, here: {', '.join(order)}. The paper's: {', '.join(paper)}.",
        "",
        "![Both by place, one point a seed](distillation-places.png)",
        "",
        "### First or even",
        "",
        f"| blocks kept | seeds {columns}",
        rule,
        *(
            _row(rule_, runs)
            for rule_, runs in (
                ("the first 5 of 10", by_place.get("self-attention", [])),
                ("0, 2, 4, 6, 9", group(data["runs"], group="layers")),
            )
            if runs
        ),
    ]
    return "\n".join(lines) + "\n"


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


def addons(data: Mapping[str, Any]) -> str:
    """The tables of the LoRA and the ControlNet, and their sheets."""
    found = data["addons"]
    return "\n".join(
        (
            "A LoRA of attention at rank 4 that knows one more colour word, cyan, trained on the teacher; prompts are "
            "the ones above with cyan in the place of the shape's colour. Shares of pictures in %, and the mean share "
            "of cyan in what stands out:",
            "",
            *_rows(found["lora"], LORA_COLUMNS),
            "",
            "![Rows: teacher, teacher with LoRA, student, student with LoRA by our nodes, by stock nodes]"
            "(distillation-lora.png)",
            "",
            "A ControlNet that draws the shape behind an outline, trained on the teacher; prompts name a background "
            "and nothing else. Overlap is the mean intersection over union with the drawing, 0 to 1; shares in %:",
            "",
            *_rows(found["controlnet"], CONTROL_COLUMNS),
            "",
            "![Rows: outlines, teacher, teacher with ControlNet, student, student with ControlNet by our nodes, by "
            "stock nodes](distillation-controlnet.png)",
            "",
        )
    )


def _rows(found: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    head = [f"| | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    digits = {"overlap": 2}
    return [
        *head,
        *(
            f"| {row['row']} | " + " | ".join(f"{row[name]:.{digits.get(name, 1)}f}" for name in columns) + " |"
            for row in found
        ),
    ]


def pictures(work: Path) -> None:
    """The same prompts by the teacher and at the end of each curve, a row each."""
    names = ["teacher", *(study.config(run, work).output.name for run in study.CURVES)]
    rows = [Image.open(path) for name in names if (path := work / "runs" / f"{name}.png").exists()]
    if len(rows) < 2:
        return
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for at, row in enumerate(rows):
        whole.paste(row, (0, at * row.height))
    whole.save(DOCS / "distillation-pictures.png", optimize=True)


def family(data: Mapping[str, Any]) -> str:
    """What the small family is, and how good its teacher."""
    teacher, recipe = data["teacher"], denoiser.TEACHER
    told = (
        f": {recipe.small_steps} steps of {recipe.batch} pictures of {recipe.small_size} px, then {recipe.steps} of "
        f"{recipe.size} px"
    )
    return f"""## The small family

**sdxl-tiny** has SDXL's layout (two layers a stage, transformer depths 0, 2, 10, a middle block; 24.2 M weights) at
koala-tiny's width, with koala-tiny's autoencoder and text encoders, and was trained on the same drawings by the same
chain{teacher.get("history", told)}. Students have koala-tiny's layout (7.5 M weights).

A picture counts as right when its shape, the shape's colour and the background are what the prompt says;
{judging.PROMPTS} prompts, 25 steps, cfg 7.5, read off the pixels. The held-out error is that of the predicted noise,
weighted as velocity's, on {judging.HELD_OUT} drawings that no training saw, with the same noise and time steps for
every U-Net. The teacher: all right {teacher["all"]:.1f} %, shape {teacher["shape"]:.1f} %, colour
{teacher["colour"]:.1f} %, background {teacher["background"]:.1f} %.

Every run: {study.PICTURES} drawings, batch {study.BATCH}, AdamW at 1e-3, task, output and feature error with a factor
of 1, task and output error weighted as velocity's, at most {study.WEIGHTING["most_weight"]:g} times.
"""


def against_nothing(data: Mapping[str, Any]) -> str:
    """The curves, with the pictures at their ends."""
    return f"""## Distilled against trained from nothing

*distilled*: cut out of the teacher, all three errors, self-attention features as KOALA's. *distilled, residual*: those
of residual blocks. *from nothing*: random weights, no teacher; the same pictures and steps, not the small pictures that
`train-tiny` begins with; what that came to is told as *koala-tiny as it was*. The pack's koala-tiny is now
*{study.STUDENT.name}*. The teacher's own training is not counted. After so many steps:

{curves(data)}
![The same twelve prompts: the teacher, and each run's last pictures](distillation-pictures.png)

*From above: the teacher, {"; ".join(run.name for run in study.CURVES)}.*
"""


def _task_errors(data: Mapping[str, Any]) -> str:
    found = [run["last_errors"]["task"] for run in group(data["runs"], group="place")]
    return f"{min(found):.3f} to {max(found):.3f}"


def places(data: Mapping[str, Any]) -> str:
    """The ablation."""
    return f"""## Where features are taken

KOALA's table 3 on the small family: {study.ABLATION[0].steps} steps from the same cut, the same data, three seeds each
(mean and standard deviation). *none* has task and output error only. *Feature error*: what that term still was in the
last 50 steps. All terms count once, as in the paper, so that a place with large features counts more; for comparison,
the task error ended at {_task_errors(data)}.

{ablation(data)}"""


def carried(data: Mapping[str, Any]) -> str:
    """SDXL's add-ons on a student."""
    run = study.STUDENT
    return f"""## SDXL's add-ons on the distilled student

Trained on sdxl-tiny, carried to its student ({run.name}, {run.steps} steps) by the pack's nodes, and by stock nodes,
which go by names. Three ways with the changes of layers that KOALA lacks: leave them out (*ours*), give them to the
neighbour (*fold*), make up for them by *strength*.

{addons(data)}"""


def full_size(data: Mapping[str, Any]) -> str:
    """What the dry run saw."""
    found = data["dry_run"]
    errors = ("task", "output", "feature")
    rows = "\n".join(
        f"| {row['step']:.0f} | {' | '.join(f'{row[name]:.4f}' for name in errors)} | {seconds:.0f} | {peak:.1f} |"
        for row, seconds, peak in zip(found["metrics"], found["seconds"], found["peak_gb"], strict=True)
    )
    verdict = "the same weights" if found["same_in_stock_comfyui"] else "OTHER weights"
    return f"""## At real scale, two steps

`python -m tools.run koala_sdxl.distill.study.dry_run`, random weights: SDXL in bf16 teaches a KOALA-700M in fp32 at
256 px, a picture a step, with gradient checkpointing, on a CPU. Each step is a process of its own: the second goes on
from the first one's checkpoint. The result loads in this pack and in stock ComfyUI to {verdict}. Seconds and peak
memory are the process's, starting, caching, checkpoint and result included.

| step | task error | output error | feature error | seconds | peak, GB |
|---|---|---|---|---|---|
{rows}
"""


SECTIONS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], str]], ...] = (
    (lambda data: "teacher" in data, family),
    (lambda data: len(group(data["runs"], group="curve")) > 1, against_nothing),
    (lambda data: bool(group(data["runs"], group="place")), places),
    (lambda data: "addons" in data, carried),
    (lambda data: "dry_run" in data, full_size),
    (lambda data: True, lambda data: scale_page.section()),
)
"""Parts of the page: when there is something to tell, and what."""


def write(work: Path) -> Path:
    """Write the page, its plots and the figures; returns the page."""
    data = collect(work)
    DATA.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    pictures(work)
    if "addons" in data:
        size, student = data["addons"]["settings"]["size"], Path(data["addons"]["student"]).stem
        for name in ("lora", "controlnet"):
            shutil.copy(work / "addons" / f"{name}-{size}-{student}.png", DOCS / f"distillation-{name}.png")
    told = computers(data) + "\n" + "\n".join(part(data) for there, part in SECTIONS if there(data))
    missing = [part.__name__.replace("_", " ") for there, part in SECTIONS if not there(data)]
    head = """# Distillation, tried out

What `python3 dev.py distill` does ([how to use it](../distill/README.md)), measured on a family small enough for
two CPU cores, and worked out on paper for the real one. Written by `python3 dev.py distill-study`.

"""
    tail = f"""
## What this does not show

- The small family draws six shapes in nine colours at {judging.SIZE} px; what wins there need not win on photographs.
- Three seeds tell large differences from chance, not small ones: compare the spreads.
- Nothing here has run with SDXL's own weights.
"""
    if missing:
        tail += f"- Not measured yet: {', '.join(missing)}.\n"
    path = DOCS / "distillation.md"
    path.write_text(head + told + tail, "utf-8")
    return path
