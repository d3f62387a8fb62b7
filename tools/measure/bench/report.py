"""docs/benchmarks.md out of docs/benchmarks.json: words and tables; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tools.measure.bench import plots, readings, store
from tools.measure.bench.formats import table
from tools.measure.bench.readings import Sections
from tools.measure.bench.report_bounds import bounds, macs, preset_bounds
from tools.measure.bench.report_quality import other_runs, quality
from tools.measure.bench.report_speed import decode, load, memory, sample, step
from tools.measure.bench.sections import judged_model
from tools.measure.bench.targets import TARGETS, judge

NAME = "benchmarks.md"
Part = Callable[[Sections, str], Iterator[str]]


def write(folder: Path) -> Path:
    """Write the report and its plots beside the results; returns the report's path."""
    results = store.read(folder)
    lines = [
        "# Benchmarks",
        "",
        "This pack, stock ComfyUI and diffusers on the same weights, measured side by side. Written by "
        "`python3 dev.py bench`; all measurements are in [benchmarks.json](benchmarks.json). Weights are random at "
        "KOALA-700M's size; images that are judged are koala-tiny's. Engines take turns, each in a process of its own. "
        "A figure is the median, in brackets least..most; a ratio is the median of the pairs' ratios.",
        "",
    ]
    for device, sections in results.items():
        drawn = plots.draw(folder, device, sections)
        lines += [f"## On the {'CPU' if device == 'cpu' else 'GPU'}", "", *_device(sections, drawn)]
    (folder / NAME).write_text("\n".join(lines), "utf-8")
    return folder / NAME


def _device(sections: Sections, drawn: Mapping[str, str]) -> Iterator[str]:
    kind = plots.memory_kind(sections)
    yield from _targets(sections, kind)
    for part in PARTS:
        try:
            lines = list(part(sections, kind))
        except readings.NotMeasured:
            continue
        yield from lines
        for plot in PLOT_AFTER.get(part, ()):
            if plot in drawn:
                yield from (f"![{plot}]({drawn[plot]})", "")


def _targets(sections: Sections, kind: str) -> Iterator[str]:
    verdicts = [judge(target, sections, kind) for target in TARGETS[kind]]
    yield from ("### Targets", "")
    if "quality" in sections and readings.figures(sections, "quality").get("model") != judged_model():
        yield from (
            "**Out of date:** PSNR and prompt fidelity, here and under *Quality*, were measured with another "
            "koala-tiny than the one in assets/. `python3 dev.py bench quality` measures them again.",
            "",
        )
    if kind == "ram":
        yield from (
            "*balanced* and *fast* compute in bf16 where the pack measures that the processor is faster in it. "
            "*balanced, fp32* and *fast, fp32* are the same without bf16.",
            "",
        )
    yield from table(
        ("target", "bound", "measured", ""),
        (
            (
                one.target.what,
                f"{'at most' if one.target.at_most else 'at least'} {one.target.bound:g} {one.target.unit}",
                "" if one.figure is None else f"{one.figure:.3g} {one.target.unit}",
                str(one),
            )
            for one in verdicts
        ),
    )


def _machine(sections: Sections, kind: str) -> Iterator[str]:
    yield from ("### Machine", "")
    for section, entry in sections.items():
        about = entry["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        gpu = f"{about['gpu']}, " if about["gpu"] else ""
        yield (
            f"- {section}: {entry['date']}, {gpu}{about['cpu']}, {about['threads']} threads, "
            f"{about['memory'] / 1e9:.0f} GB; {versions}"
        )
    found = readings.figures(sections, "machine")
    yield from (
        "",
        "Measured rates: matrices of 2048 x 2048 "
        + ", ".join(f"{rate:.0f} GFLOP/s ({how})" for how, rate in found["matmul"].items())
        + f"; fp16 weights to fp32 {found['fp16 to fp32']:.1f} GB/s. KOALA Accelerate's own probes: "
        + ", ".join(f"{what} is {'' if faster else 'not '}faster" for what, faster in found["faster"].items())
        + ". 3 x 3 convolutions, GFLOP/s:",
        "",
    )
    ways = [way for way in ("contiguous", "channels_last", "bf16") if way in found["unet"][0]]
    yield from table(
        ("batch, channels, size", *ways),
        ((one["shape"], *(f"{one[way]:.0f}" for way in ways)) for one in (*found["unet"], *found["vae"])),
    )


PARTS: tuple[Part, ...] = (
    _machine,
    macs,
    load,
    step,
    decode,
    sample,
    memory,
    quality,
    other_runs,
    bounds,
    preset_bounds,
)
"""In the report's order; each takes a device's sections, and which memory counts there: "ram" or "gpu"."""
PLOT_AFTER: dict[Part, tuple[str, ...]] = {step: ("size", "batch"), quality: ("quality",)}
