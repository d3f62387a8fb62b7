"""docs/benchmarks.md out of docs/benchmarks.json: words and tables; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tools.harness.testhost import ROOT
from tools.measure.bench import plots, readings, store
from tools.measure.bench.asked import ENDED_EARLY, LEFT_OUT
from tools.measure.bench.formats import table, with_spread
from tools.measure.bench.readings import Sections
from tools.measure.bench.report_bounds import bounds, macs, preset_bounds
from tools.measure.bench.report_gpu import fit, images, server
from tools.measure.bench.report_quality import other_runs, quality
from tools.measure.bench.report_speed import decode, load, memory, sample, step
from tools.measure.bench.sections import OF_DEVICES, judged_model
from tools.measure.bench.targets import OF_IMAGES, TARGETS, Target, judge

NAME = "benchmarks.md"
Part = Callable[[Sections, str], Iterator[str]]
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def write(folder: Path) -> Path:
    """Write the report and its plots beside the results; returns the report's path."""
    machines, shared = store.read(folder), {**_counted(), **store.shared(folder)}
    drawn: dict[str, str] = {}
    lines = [
        "# Benchmarks",
        "",
        "This pack, stock ComfyUI and diffusers on the same weights, measured side by side. Written by "
        "`python3 dev.py bench`; all measurements, older ones too, are in [benchmarks.json](benchmarks.json). Weights "
        "are random at KOALA-700M's size; images that are judged are koala-tiny's. Engines take turns, each in a "
        "process of its own, but where a section says otherwise. A figure is the median, in brackets least..most; a "
        "ratio is the median of the pairs' ratios. A target is undecided where its bound lies between least and most. "
        "No table mixes two machines; what does not depend on the machine comes first.",
        "",
    ]
    if shared:
        drawn |= plots.draw(folder, "cpu", shared, ("quality",))
        lines += ["## Images and multiplications", "", *_shared(shared, drawn)]
    for device, name in DEVICES.items():
        measured = {machine: sections for machine, sections in machines.items() if machine.device == device}
        if not measured:
            lines += [f"## On the {name}", "", f"Not measured. `python3 dev.py bench --device {device}` does.", ""]
        for machine, sections in measured.items():
            missing = [plot for plot in plots.OF_MACHINES if plots.key(plot, device) not in drawn]
            new = plots.draw(folder, device, sections, missing)
            drawn |= {plots.key(plot, device): file for plot, file in new.items()}
            lines += [f"## On the {name}: {machine}", "", *_measured(device, sections, shared, new)]
    (folder / NAME).write_text("\n".join(lines), "utf-8")
    return folder / NAME


def _counted() -> Sections:
    """The multiplications as this checkout's own page has them: the same for whoever counts, and a bound needs them."""
    return {name: entry for name, entry in store.shared(ROOT / "docs").items() if name == "macs"}


def _shared(shared: Sections, drawn: Mapping[str, str]) -> Iterator[str]:
    """What is the same on every machine, but for rounding."""
    yield from _when(shared)
    if "quality" in shared and readings.figures(shared, "quality").get("model") != judged_model():
        yield from (
            "**Out of date:** PSNR and prompt fidelity were measured with another koala-tiny than the one in assets/. "
            "`python3 dev.py bench quality` measures them again.",
            "",
        )
    yield from _targets(OF_IMAGES, shared, "ram")
    yield from _parts(SHARED_PARTS, shared, "ram", drawn)


def _measured(device: str, sections: Sections, shared: Sections, drawn: Mapping[str, str]) -> Iterator[str]:
    """What was measured on one machine."""
    kind = "gpu" if device == "cuda" else "ram"
    everything = {**shared, **sections}
    yield from _when(sections)
    missing = [name for name in OF_DEVICES[device] if name not in everything]
    if missing:
        yield from (f"Not measured on this machine: {', '.join(missing)}.", "")
    why = next((entry["machine"]["nvml"] for entry in sections.values() if entry["machine"].get("nvml")), "")
    if why:
        yield from (f"Memory of a process as the driver counts it: not told, as {why}.", "")
    for name, entry in sections.items():
        figures = entry["figures"]
        if dropped := figures.get("dropped"):
            yield from (f"Dropped from *{name}* for want of time: {', '.join(dropped)}.", "")
        if words := figures.get(ENDED_EARLY):
            yield from (f"*{name}* ended early {words.splitlines()[0]}", "")
        if left_out := figures.get(LEFT_OUT):
            yield from (f"Not reached in *{name}*: {', '.join(left_out)}.", "")
    yield from _targets(TARGETS[kind], everything, kind)
    yield from _parts(PARTS, everything, kind, drawn)


def _parts(parts: Iterable[Part], sections: Sections, kind: str, drawn: Mapping[str, str]) -> Iterator[str]:
    for part in parts:
        try:
            lines = list(part(sections, kind))
        except readings.NotMeasured:
            continue
        yield from lines
        for plot in PLOT_AFTER.get(part, ()):
            if plot in drawn:
                yield from (f"![{plot}]({drawn[plot]})", "")


def _when(sections: Sections) -> Iterator[str]:
    """When and with what each section was measured."""
    by_circumstances: dict[str, list[str]] = {}
    for section, entry in sections.items():
        about = entry["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        where = str(store.Machine.of(entry)) + ", " if section in store.SHARED else ""
        told = f"{entry['date']}, {where}{about['memory'] / 1e9:.0f} GB; {versions}"
        by_circumstances.setdefault(told, []).append(section)
    yield from (f"- {', '.join(names)}: {told}" for told, names in by_circumstances.items())
    yield ""


def _targets(targets: Iterable[Target], sections: Sections, kind: str) -> Iterator[str]:
    verdicts = [judge(target, sections, kind) for target in targets]
    verdicts = [verdict for verdict in verdicts if verdict.figure is not None]
    if not verdicts:
        return
    yield from ("### Targets", "")
    yield from table(
        ("target", "bound", "measured", ""),
        (
            (
                one.target.what,
                f"{'at most' if one.target.at_most else 'at least'} {one.target.bound:g} {one.target.unit}",
                with_spread(one.figure, one.target.unit),
                str(one),
            )
            for one in verdicts
            if one.figure is not None
        ),
    )


def _machine(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "machine")
    yield from (
        "### Rates",
        "",
        f"Measured rates: matrices of {found.get('side', 2048)} x {found.get('side', 2048)} "
        + ", ".join(f"{rate:.0f} GFLOP/s ({how})" for how, rate in found["matmul"].items())
        + f"; fp16 weights to fp32 {found['fp16 to fp32']:.1f} GB/s. KOALA Accelerate's own probes: "
        + ", ".join(f"{what} is {'' if faster else 'not '}faster" for what, faster in found["faster"].items())
        + ". 3 x 3 convolutions, GFLOP/s, as if all were computed directly:",
        "",
    )
    ways = [way for way in ("contiguous", "channels_last", "Winograd", "bf16") if way in found["unet"][0]]
    yield from table(
        ("batch, channels, size", *ways),
        ((one["shape"], *(f"{one[way]:.0f}" for way in ways)) for one in (*found["unet"], *found["vae"])),
    )


SHARED_PARTS: tuple[Part, ...] = (macs, quality, other_runs)
PARTS: tuple[Part, ...] = (
    _machine,
    images,
    server,
    fit,
    load,
    step,
    decode,
    sample,
    memory,
    bounds,
    preset_bounds,
)
"""In the report's order; each takes a machine's sections, and which memory counts there: "ram" or "gpu"."""
PLOT_AFTER: dict[Part, tuple[str, ...]] = {step: ("size", "batch"), quality: ("quality",)}
