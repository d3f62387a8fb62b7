"""docs/benchmarks.md out of docs/benchmarks.json: words and tables; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.measure.bench import plots, readings, store
from tools.measure.bench.readings import Sections
from tools.measure.bench.sections import BATCHES, DECODED, FEWER, OURS, RIVALS, SIZES, WHOLE, judged_model
from tools.measure.bench.stats import Spread, at_cost, spread
from tools.measure.bench.targets import TARGETS, judge
from tools.measure.bench.variants import REUSE_ALONE, ROUTINES, SAME_ROUTINES, VARIANTS

NAME = "benchmarks.md"
KOALA = "KOALA-700M"
WAY_NAMES = {
    "stock": "KSampler, stock loader",
    "KOALA Sampler": "KOALA Sampler",
    **{variant: f"KOALA Accelerate: {variant}" for variant in VARIANTS},
}


def write(folder: Path) -> Path:
    """Write the report and its plots beside the results; returns the report's path."""
    results = store.read(folder)
    lines = [
        "# Benchmarks",
        "",
        "This pack, stock ComfyUI and diffusers on the same weights, measured side by side. Written by "
        "`python3 dev.py bench`; the raw figures are in [benchmarks.json](benchmarks.json). Weights are random at "
        "KOALA-700M's size, pictures that are judged koala-tiny's. Engines take turns, each in a process of its own; a "
        "figure is the median, in brackets least..most; a ratio is the median of the pairs' ratios.",
        "",
    ]
    for device, sections in results.items():
        drawn = plots.draw(folder, device, sections)
        lines += [f"## On the {'CPU' if device == 'cpu' else 'GPU'}", "", *_device(sections, drawn)]
    (folder / NAME).write_text("\n".join(lines), "utf-8")
    return folder / NAME


def _device(sections: Sections, drawn: Mapping[str, str]) -> Iterator[str]:
    memory = plots.memory_kind(sections)
    yield from _targets(sections, memory)
    for part in (
        _machine,
        _macs,
        _load,
        _step,
        _decode,
        _sample,
        _memory,
        _quality,
        _other_runs,
        _bounds,
        _preset_bounds,
    ):
        try:
            lines = list(part(sections, memory))
        except KeyError:  # a section that it needs was not measured
            continue
        yield from lines
        for plot in PLOT_AFTER.get(part, ()):
            if plot in drawn:
                yield from (f"![{plot}]({drawn[plot]})", "")


def _targets(sections: Sections, memory: str) -> Iterator[str]:
    verdicts = [judge(target, sections, memory) for target in TARGETS[memory]]
    yield from ("### Targets", "")
    if "quality" in sections and readings.figures(sections, "quality").get("model") != judged_model():
        yield from (
            "**Not of today:** PSNR and prompt fidelity, here and under *Quality*, were measured with another "
            "koala-tiny than the one in assets/. `python3 dev.py bench quality` measures them anew.",
            "",
        )
    if memory == "ram":
        yield from (
            "*balanced* and *fast* compute in bf16 where the processor is faster in it, as it is measured to be by the "
            "pack itself; what they are without that is told as *balanced, fp32* and *fast, fp32*.",
            "",
        )
    yield from _table(
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


def _machine(sections: Sections, memory: str) -> Iterator[str]:
    yield from ("### Machine", "")
    for section, entry in sections.items():
        about = entry["about"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        gpu = f"{about['gpu']}, " if about["gpu"] else ""
        yield (
            f"- {section}: {entry['measured']}, {gpu}{about['cpu']}, {about['threads']} threads, "
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
    yield from _table(
        ("batch, channels, size", *ways),
        ((one["shape"], *(f"{one[way]:.0f}" for way in ways)) for one in (*found["unet"], *found["vae"])),
    )


def _macs(sections: Sections, memory: str) -> Iterator[str]:
    found = readings.figures(sections, "macs")["unets"]
    sdxl = {px: sum(parts.values()) for px, parts in found["SDXL"]["sizes"].items()}
    yield from ("### Multiplications", "", "T a forward pass of one picture, without guidance, and of SDXL's.", "")
    yield from _table(
        ("U-Net", *(f"{px} px" for px in sdxl), "convolution", "linear", "attention", "head"),
        (
            (
                name,
                *(
                    f"{sum(unet['sizes'][px].values()) / 1e12:.2f} ({sum(unet['sizes'][px].values()) / whole:.2f})"
                    for px, whole in sdxl.items()
                ),
                *(_percent(part / sum(unet["sizes"]["1024"].values())) for part in unet["sizes"]["1024"].values()),
                _percent(unet["head"]),
            )
            for name, unet in found.items()
        ),
    )
    blocks = ", ".join(f"{block} {_percent(share)}" for block, share in found[KOALA]["blocks"].items())
    yield from (
        "Shares of the operations are those at 1024 px; the head is what a step on a foretold feature computes, at "
        f"512 px. {KOALA}'s blocks at 512 px: {blocks}.",
        "",
    )


def _load(sections: Sections, memory: str) -> Iterator[str]:
    found = readings.figures(sections, "load")
    yield from (
        "### Loading",
        "",
        "A diffusers folder, its files read before: KOALA Checkpoint Loader, DiffusersLoader, "
        "`StableDiffusionXLPipeline.from_pretrained`. Memory is the most that was in use while loading, mapped files "
        "included, above what the process had before.",
        "",
    )
    titles = {"whole": "everything", "unet": "U-Net alone", "again": "everything, again"}
    yield from _table(
        ("what", "engine", "seconds", "over stock", "memory, GB", "weights, GB"),
        (
            (
                titles[what],
                engine,
                _times(readings.seconds(runs)),
                _ratio(readings.ratio(readings.seconds(runs), readings.seconds(engines["stock"]))),
                f"{readings.most(runs, memory, 'above') / 1e9:.2f}",
                f"{runs[0]['weights'] / 1e9:.2f}",
            )
            for what, engines in found.items()
            for engine, runs in engines.items()
        ),
    )


def _step(sections: Sections, memory: str) -> Iterator[str]:
    found = readings.figures(sections, "step")
    yield from ("### A step", "", "One guided step (prompt and negative prompt), the U-Net alone in the process.", "")
    yield from _turns(found["sizes"], SIZES, "px", memory)
    yield from ("By pictures at once, 256 px:", "")
    yield from _turns(found["batches"], BATCHES, "pictures", memory)
    apart = ", ".join(f"{engine} {apart:.1g}" for engine, apart in found["difference"].items() if engine != "stock")
    way = readings.ours(sections)
    ours = {px: readings.step_seconds(sections, way, int(px)).median for px in found["sdxl"]}
    sdxl = ", ".join(
        f"{spread(readings.seconds(runs)).median:.2f} s at {px} px ({KOALA}, {way}: {ours[px]:.2f} s, "
        f"{ours[px] / spread(readings.seconds(runs)).median:.2f} of it)"
        for px, runs in found["sdxl"].items()
    )
    yield from (
        f"Largest difference from stock's latent, over the largest value in it: {apart}.",
        "",
        f"SDXL's U-Net (random weights, core's classes, measured after these, alone): {sdxl}.",
        "",
    )


def _decode(sections: Sections, memory: str) -> Iterator[str]:
    found = readings.figures(sections, "decode")
    yield from ("### VAE decode", "")
    yield from _turns(found["sizes"], DECODED, "px", memory)
    apart = "; ".join(
        f"{px} px: "
        + ", ".join(f"{engine} {255 * apart:.2g}" for engine, apart in engines.items() if engine != "stock")
        for px, engines in found["difference"].items()
    )
    yield from (f"Largest difference from stock's picture, of 255: {apart}.", "")


def _sample(sections: Sections, memory: str) -> Iterator[str]:
    found = readings.figures(sections, "sample")
    yield from (
        "### A whole run",
        "",
        "Euler, 25 steps at 512 px, cfg 7.5, the same sigmas, all in one process. *balanced* and *fast* reuse features "
        "and, on a CPU that is faster in bf16, compute in bf16; *fp32* is their reuse alone, by the routines of "
        "*exact*, and *bf16 alone* is bf16 without reuse.",
        "",
    )
    yield from _table(
        ("way", "seconds", "faster than stock", "faster than KOALA Sampler", "it said"),
        (
            (
                WAY_NAMES[way],
                _times(found["runs"][way]),
                _ratio(readings.speed_up(sections, way)),
                _ratio(readings.speed_up(sections, way, "KOALA Sampler")),
                found["said"][way],
            )
            for way in found["runs"]
        ),
    )
    yield from ("What KOALA Sampler adds to KSampler on the same MODEL with the same sigmas:", "")
    yield from _table(
        ("runs", "KSampler, s", "KOALA Sampler, s", "added"),
        (
            (
                name,
                _times(times["KSampler"], 3),
                _times(times["KOALA Sampler"], 3),
                "{:+.1f} % ({:+.1f}..{:+.1f})".format(*readings.overhead(sections, name)),
            )
            for name, times in found["overhead"].items()
        ),
    )


def _memory(sections: Sections, memory: str) -> Iterator[str]:
    found = readings.figures(sections, "memory")
    yield from (
        "### Memory",
        "",
        "The most of a process that loads everything, does 2 steps at 512 px and decodes, GB.",
        "",
    )
    yield from _table(
        ("engine", "loading", "steps", "decoding", "all"),
        (
            (
                engine,
                *(f"{max(run[part][memory] for run in runs) / 1e9:.2f}" for part in ("load", "step", "decode")),
                f"{readings.life_peak(sections, engine, memory) / 1e9:.2f}",
            )
            for engine, runs in found.items()
        ),
    )


def _quality(sections: Sections, memory: str) -> Iterator[str]:
    found = readings.figures(sections, "quality")
    yield from (
        "### Quality",
        "",
        f"koala-tiny, {found['prompts']} prompts, {found['base']}: PSNR of the decoded pictures to those of the whole "
        "run, mean over the pictures; prompts drawn right, in percent. The cost counts U-Net multiplications, a "
        f"step on a foretold feature with KOALA-700M's {_percent(found['head'])}; that those in bf16 may be cheaper "
        "it does not count; *balanced* and *fast* are judged in bf16 on every processor. *Fewer steps* in the last "
        "column: PSNR of fewer steps at the same cost, between whole numbers of steps on a straight line. EasyCache "
        "and LazyCache judge all prompts as one batch.",
        "",
    )
    curve = [(row["cost"], row["psnr"]) for family in (FEWER, WHOLE) for row in readings.rows(sections, family)]
    yield from _table(
        ("what", "setting", "cost", "at most faster", "PSNR, dB", "fidelity, %", "fewer steps, dB"),
        (
            (
                family,
                row["value"],
                f"{row['cost']:.3f}",
                f"{1 / row['cost']:.2f} x",
                f"{row['psnr']:.1f}",
                f"{row['fidelity']:.1f}",
                "" if family in (WHOLE, FEWER) else f"{at_cost(curve, row['cost']):.1f}",
            )
            for family in (WHOLE, OURS, *RIVALS, FEWER)
            for row in readings.rows(sections, family)
        ),
    )


def _other_runs(sections: Sections, memory: str) -> Iterator[str]:
    yield from (
        "Other samplers and numbers of steps, each against its own whole run, with "
        f"{readings.figures(sections, 'quality')['prompts_of_others']} prompts; in brackets how far above fewer steps "
        "of the same sampler at the same cost. dpmpp_2m and res_multistep go by several steps, and get more of them in "
        "full:",
        "",
    )
    names = list(REUSE_ALONE)

    def cells(run: str) -> Iterator[str]:
        for name in names:
            row = readings.preset(sections, name, run)
            gain = readings.above(sections, name, run=run)
            yield f"{1 / row['cost']:.2f} x, {row['psnr']:.1f} dB ({gain:+.1f}), {row['fidelity']:.1f} %"

    yield from _table(
        ("run", "fidelity, whole", *names),
        (
            (run, f"{readings.rows(sections, WHOLE, run)[0]['fidelity']:.1f} %", *cells(run))
            for run in readings.runs_surveyed(sections)
        ),
    )


def _bounds(sections: Sections, memory: str) -> Iterator[str]:
    """What the machine allows, beside what was reached."""
    lines = []
    for section, what, model, places, pictures in (
        ("step", "a guided step", KOALA, SIZES, 2),
        ("decode", "VAE decode", "vae", DECODED, 1),
    ):
        for px in places:
            for way, runs in readings.figures(sections, section)["sizes"][str(px)].items():
                if way in (readings.ours(sections), *ROUTINES):
                    in_bf16 = way == "pack, bf16" and readings.figures(sections, "machine")["faster"]["bf16"]
                    least = readings.bound(sections, model, px, pictures, in_bf16)
                    lines.append((f"{what}, {px} px", way, least, spread(readings.seconds(runs)).median))
    yield from (
        "### What bounds it",
        "",
        "Multiplications over the measured rates, convolutions in their faster layout at the mean rate of the shapes "
        "above, all else at that of the large matrices. Norms, activations and copies come on top; small matrices, and "
        "attention, run below that rate. In bf16 the weights are converted at every step, too.",
        "",
    )
    yield from _table(
        ("what", "engine", "bound, s", "measured, s", "share of the bound's speed"),
        ((*what, f"{least:.2f}", f"{found:.2f}", _percent(least / found)) for *what, least, found in lines),
    )


def _preset_bounds(sections: Sections, memory: str) -> Iterator[str]:
    yield from (
        "Reuse can be no faster over the whole run by the same routines than its multiplications are fewer:",
        "",
    )
    yield from _table(
        ("variant", "multiplications", "measured", "over"),
        (
            (
                name,
                f"{1 / readings.preset(sections, name)['cost']:.2f} x fewer",
                _ratio(readings.speed_up(sections, name, other)),
                other,
            )
            for name, other in SAME_ROUTINES.items()
        ),
    )


def _turns(found: Mapping[str, Any], places: Iterable[int], unit: str, memory: str) -> list[str]:
    return _table(
        (unit, "engine", "seconds", "over stock", "peak of the process, GB"),
        (
            (
                at,
                engine,
                _times(readings.seconds(runs)),
                _ratio(readings.ratio(readings.seconds(runs), readings.seconds(found[str(at)]["stock"]))),
                f"{readings.most(runs, memory) / 1e9:.2f}",
            )
            for at in places
            for engine, runs in found[str(at)].items()
        ),
    )


def _times(values: list[float], digits: int = 2) -> str:
    median, least, most = (f"{value:.{digits}f}" for value in spread(values))
    return f"{median} ({least}..{most})"


def _ratio(found: Spread) -> str:
    return "{:.2f} x ({:.2f}..{:.2f})".format(*found)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    listed = [[str(cell) for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in listed]
    return [lines[0], "|" + "---|" * len(listed[0]), *lines[1:], ""]


PLOT_AFTER: dict[Callable[[Sections, str], Iterator[str]], tuple[str, ...]] = {
    _step: ("size", "batch"),
    _quality: ("quality",),
}
