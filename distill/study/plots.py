"""The plots and the grid of images in docs/distillation.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image

matplotlib.use("Agg")  # needs no screen

from matplotlib import pyplot

JUDGED = {"all": ("all correct, %", 1), "held_out": ("held-out error", 4)}
"""What is shown of the judgements along a curve: title, and number of digits."""
Runs = Sequence[Mapping[str, Any]]


def last(run: Mapping[str, Any]) -> dict[str, float]:
    """The judgement at the end of a run."""
    return run["curve"][str(run["steps"])]


def curves(
    runs: Mapping[str, Mapping[str, Any]], references: Mapping[str, tuple[Mapping[str, Any], str]], path: Path
) -> None:
    """Both judgements against training steps. runs: label -> run; references: label -> judgement, line style."""
    figure = pyplot.figure(figsize=(11, 4), layout="constrained")
    for axes, (what, (title, _)) in zip(figure.subplots(1, 2), JUDGED.items(), strict=True):
        for label, run in runs.items():
            points = sorted((int(step), score[what]) for step, score in run["curve"].items())
            axes.plot(*zip(*points, strict=True), ".-", label=label)
        for label, (judgement, style) in references.items():
            axes.axhline(judgement[what], color="#777777", linestyle=style, label=label)
        axes.set(xlabel="training steps", ylabel=title)
        axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def places(by_place: Mapping[str, Runs], path: Path) -> None:
    """Both judgements at the end of each run, by where its features were taken."""
    figure = pyplot.figure(figsize=(11, 4), layout="constrained")
    for axes, (what, (title, _)) in zip(figure.subplots(1, 2), JUDGED.items(), strict=True):
        for at, runs in enumerate(by_place.values()):
            axes.plot([at] * len(runs), [last(run)[what] for run in runs], "o", color="#2f6f4f", alpha=0.6)
        axes.set_xticks(range(len(by_place)), by_place, rotation=20)
        axes.set(ylabel=title, title="one point per seed")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def stacked(rows: Sequence[Path], path: Path) -> None:
    """Images of equal width, one below the other, in 256 colours. Nothing is written where some are missing."""
    images = [Image.open(row) for row in rows if row.exists()]
    if len(images) < len(rows):
        return
    sheet = Image.new("RGB", (images[0].width, sum(image.height for image in images)))
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    sheet.quantize(256).save(path, optimize=True)


def labelled(rows: Mapping[str, torch.Tensor], columns: Sequence[str], path: Path) -> None:
    """Images in rows, each row under its name and each column under its own. rows: name -> float [n, 3, s, s] in
    [-1, 1]; columns: n names."""
    figure = pyplot.figure(figsize=(1.5 * len(columns), 1.8 * len(rows) + 0.3), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (name, images) in zip(parts, rows.items(), strict=True):
        part.suptitle(name, fontsize=10)
        cells = part.subplots(1, len(columns), squeeze=False)[0]
        for axes, column, image in zip(cells, columns, images, strict=True):
            axes.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_title(column.replace(" on ", "\non "), fontsize=7)
            axes.axis("off")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
