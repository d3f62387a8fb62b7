"""The report's plots, PNG files beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

from tools.measure.bench import readings
from tools.measure.bench.readings import Sections
from tools.measure.bench.sections import ALL, BATCHES, FEWER, OURS, RIVALS, SIZES
from tools.measure.bench.stats import spread
from tools.measure.bench.variants import REUSE_ALONE

matplotlib.use("Agg")  # needs no screen

from matplotlib import pyplot

BF16_PRESETS = ("balanced", "fast")
COLOURS = {
    "pack": "#2f6f4f",
    "pack, exact": "#2f6f4f",
    "pack, bf16": "#8a5fb0",
    "stock": "#c26a2e",
    "diffusers": "#4a6fa5",
    "pack, compiled": "#7fb89a",
    "stock, compiled": "#e3b08c",
    OURS: "#2f6f4f",
    FEWER: "#777777",
    "EasyCache": "#c26a2e",
    "LazyCache": "#b0418a",
    "CFGOverride": "#4a6fa5",
}


def key(name: str, device: str) -> str:
    """What tells a plot from that of another device; the file is named by it."""
    return name if device == "cpu" else f"{name}-{device}"


def draw(folder: Path, device: str, sections: Sections, names: Iterable[str]) -> dict[str, str]:
    """Draw some of ``PLOTS`` on a device, as far as they were measured. Returns each one's file by its name."""
    drawn = {}
    for name in names:
        plot = PLOTS[name]
        figure = pyplot.figure(figsize=(9, 4.4), layout="constrained")
        try:
            plot(figure, sections)
        except readings.NotMeasured:
            continue
        finally:
            pyplot.close(figure)
        file = f"benchmarks-{key(name, device)}.png"
        figure.savefig(folder / file, dpi=100)
        drawn[name] = file
    return drawn


def _quality(figure: Any, sections: Sections) -> None:
    """Speed that the multiplications allow, against PSNR and against the prompts that are drawn correctly."""
    psnr, fidelity = figure.subplots(1, 2)
    _against(psnr, sections, "psnr")
    _against(fidelity, sections, "fidelity")
    (reference,) = readings.rows(sections, ALL)
    fidelity.axhline(reference["fidelity"], color="#999999", ls=":", label=f"all {reference['value']} steps")
    psnr.set(xlabel="times fewer U-Net multiplications", ylabel="PSNR against all steps, dB")
    fidelity.set(xlabel="times fewer U-Net multiplications", ylabel="prompts drawn correctly, %")
    _finish(psnr, legend=False)
    _finish(fidelity, legend=False)
    figure.legend(*fidelity.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _against(axes: Any, sections: Sections, what: str) -> None:
    for family in (FEWER, *RIVALS):
        points = sorted((1 / row["cost"], row[what]) for row in readings.rows(sections, family))
        axes.plot(*zip(*points, strict=True), ".-", color=COLOURS[family], label=family)
    for names, marker, words in (((*REUSE_ALONE,), "*", "fp32"), (BF16_PRESETS, "P", "bf16")):
        rows = [readings.preset(sections, name) for name in names]
        at = ([1 / row["cost"] for row in rows], [row[what] for row in rows])
        axes.plot(*at, marker, color=COLOURS[OURS], ms=11, alpha=0.8, label=f"{OURS}, {words}")
    for name, side in zip(BF16_PRESETS, ("right", "left"), strict=True):  # away from each other
        row = readings.preset(sections, name)
        place = {"xytext": (0, -9), "textcoords": "offset points", "va": "top", "ha": side}
        axes.annotate(name, (1 / row["cost"], row[what]), **place)


def _size(figure: Any, sections: Sections) -> None:
    """Seconds a step, and peak memory, against size."""
    found = readings.figures(sections, "step")["sizes"]
    time, memory = figure.subplots(1, 2)
    kind = memory_kind(sections)
    _engines(time, SIZES, found, lambda runs: spread(readings.seconds(runs)).median)
    _engines(memory, SIZES, found, lambda runs: readings.most(runs, kind) / 1e9)
    time.set(xlabel="px", ylabel="seconds a step", xticks=SIZES)
    memory.set(xlabel="px", ylabel="peak memory of the process, GB", xticks=SIZES)
    for axes in (time, memory):
        _finish(axes)


def _batch(figure: Any, sections: Sections) -> None:
    """Seconds a step against batch, 256 px."""
    found = readings.figures(sections, "step")["batches"]
    axes = figure.subplots()
    _engines(axes, BATCHES, found, lambda runs: spread(readings.seconds(runs)).median)
    axes.set(xlabel="batch, 256 px", ylabel="seconds a step", xticks=BATCHES)
    _finish(axes)


def _engines(
    axes: Any, places: tuple[int, ...], found: dict[str, dict[str, Any]], figure: Callable[[list[Any]], float]
) -> None:
    if any(str(at) not in found for at in places):  # a part of a curve says little
        raise readings.NotMeasured("step")
    for engine in found[str(places[0])]:
        axes.plot(places, [figure(found[str(at)][engine]) for at in places], "o-", color=COLOURS[engine], label=engine)


def _finish(axes: Any, legend: bool = True) -> None:
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0 if axes.get_ylabel().startswith(("seconds", "peak")) else None)
    if legend:
        axes.legend()


def memory_kind(sections: Sections) -> str:
    """Which memory is scarce where these sections were measured: the GPU's, where there was one."""
    return "gpu" if any(entry["machine"]["gpu"] for entry in sections.values()) else "ram"


PLOTS = {"quality": _quality, "size": _size, "batch": _batch}
OF_MACHINES = ("size", "batch")
"""Plots of what depends on the machine: each shows the one that was last measured at every size, or batch."""
