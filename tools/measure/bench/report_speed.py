"""The report's sections on seconds and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tools.measure.bench import readings
from tools.measure.bench.formats import ratio, table, times
from tools.measure.bench.readings import Sections
from tools.measure.bench.sections import BATCHES, DECODED, FIRST_STEP, SIZES
from tools.measure.bench.stats import spread
from tools.measure.bench.variants import ROUTINES, VARIANTS

KOALA = "KOALA-700M"
PROCESSORS = "processors' time over stock's"
WAY_NAMES = {
    "stock": "KSampler, stock loader",
    "KOALA Sampler": "KOALA Sampler",
    **{variant: f"KOALA Accelerate: {variant}" for variant in VARIANTS},
}


def load(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "load")
    yield from (
        "### Loading",
        "",
        "A diffusers folder, its files read before: KOALA Checkpoint Loader, DiffusersLoader, "
        "`StableDiffusionXLPipeline.from_pretrained`. Memory: the peak while loading, mapped files "
        "included, above what the process used before. Loaders put off work until the first step: *and a step* is "
        f"loading everything and one guided step at {FIRST_STEP} px.",
        "",
    )
    titles = {"everything": "everything", "unet": "U-Net alone", "again": "everything, again"}
    with_step = {engine: readings.first_image(sections, engine) for engine in _with_step(found)}
    yield from table(
        ("what", "engine", "seconds", "over stock", "memory, GB", "weights, GB"),
        (
            (
                titles[what],
                engine,
                times(readings.seconds(runs)),
                ratio(readings.ratio(readings.seconds(runs), readings.seconds(engines["stock"]))),
                f"{readings.most(runs, kind, 'above') / 1e9:.2f}",
                f"{runs[0]['weights'] / 1e9:.2f}",
            )
            for what, engines in found.items()
            if what in titles
            for engine, runs in engines.items()
        ),
    )
    if with_step:
        yield from table(
            ("what", "engine", "seconds", "over stock"),
            (
                ("and a step", engine, times(seconds), ratio(readings.ratio(seconds, with_step["stock"])))
                for engine, seconds in with_step.items()
            ),
        )


def _with_step(found: Mapping[str, Any]) -> Iterable[str]:
    """The engines whose first step was measured; old entries have none."""
    return found.get("first step", {})


def step(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "step")
    count = found.get("steps", 1)  # old entries, of a CPU, do not tell
    yield from (
        "### A step",
        "",
        "One guided step (prompt and negative prompt)"
        + (f", the mean of runs of {count}" if count > 1 else "")
        + ". The U-Net is alone in the process.",
        "",
    )
    yield from _turns(found["sizes"], SIZES, "px", kind)
    if found["batches"]:
        yield from ("By batch size, 256 px:", "")
        yield from _turns(found["batches"], BATCHES, "batch", kind)
    apart = ", ".join(f"{engine} {apart:.1g}" for engine, apart in found["difference"].items() if engine != "stock")
    way = readings.ours(sections)
    ours = {px: readings.step_seconds(sections, way, int(px)).median for px in found["sdxl"] if px in found["sizes"]}
    sdxl = ", ".join(
        f"{spread(readings.seconds(runs)).median:.2f} s at {px} px ({KOALA}, {way}: {ours[px]:.2f} s, "
        f"{ours[px] / spread(readings.seconds(runs)).median:.2f} of it)"
        for px, runs in found["sdxl"].items()
        if px in ours
    )
    yield from (f"Largest difference from stock's latent, over the largest value in it: {apart}.", "")
    if peers := found.get("peers"):
        yield from ("Peers, in turns with the pack alone:", "")
        yield from table(
            ("px", "engine", "seconds", "over pack, exact", "peak of the process, GB"),
            (
                (
                    px,
                    engine,
                    times(readings.seconds(runs)),
                    ratio(readings.ratio(readings.seconds(runs), readings.seconds(engines["pack, exact"]))),
                    f"{readings.most(runs, kind) / 1e9:.2f}",
                )
                for px, engines in peers.items()
                for engine, runs in engines.items()
            ),
        )
    elif why_not := found.get("without peers"):
        yield from (f"{why_not}.", "")
    if sdxl:
        yield from (f"SDXL's U-Net (random weights, core's classes, measured after these, alone): {sdxl}.", "")


def decode(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "decode")
    yield from ("### VAE decode", "")
    yield from _turns(found["sizes"], DECODED, "px", kind)
    apart = "; ".join(
        f"{px} px: "
        + ", ".join(f"{engine} {255 * apart:.2g}" for engine, apart in engines.items() if engine != "stock")
        for px, engines in found["difference"].items()
    )
    yield from (f"Largest difference from stock's image, of 255: {apart}.", "")
    if types := found.get("types"):
        told = ", ".join(f"{way} {dtype}" for way, dtype in types.items() if way not in ROUTINES)
        yield from (f"The VAE's type: {told}; *bf16* convolves in bf16 only, and where that is much faster.", "")


def sample(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "sample")
    yield from (
        "### Sampling",
        "",
        "Euler, 25 steps at 512 px, cfg 7.5, the same sigmas, all in one process. *balanced* and *fast* reuse features "
        "and, on a CPU that is faster in bf16, compute in bf16; *fp32* is their reuse alone, with the routines "
        "of *exact*, and *bf16 alone* is bf16 without reuse.",
        "",
    )
    yield from table(
        ("way", "seconds", "faster than stock", "faster than KOALA Sampler", "message"),
        (
            (
                WAY_NAMES[way],
                times(found["runs"][way]),
                ratio(readings.speed_up(sections, way)),
                ratio(readings.speed_up(sections, way, "KOALA Sampler")),
                found["said"][way],
            )
            for way in found["runs"]
        ),
    )
    yield from ("What KOALA Sampler adds to KSampler on the same MODEL with the same sigmas:", "")
    yield from table(
        ("runs", "KSampler, s", "KOALA Sampler, s", "added"),
        (
            (
                name,
                times(seconds["KSampler"], 3),
                times(seconds["KOALA Sampler"], 3),
                "{:+.1f} % ({:+.1f}..{:+.1f})".format(*readings.overhead(sections, name)),
            )
            for name, seconds in found["overhead"].items()
        ),
    )


def memory(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "memory")
    yield from (
        "### Memory",
        "",
        "Peak memory, GB, of a process that loads everything, samples 2 steps at 512 px and decodes.",
        "",
    )
    yield from table(
        ("engine", "loading", "steps", "decoding", "all"),
        (
            (
                engine,
                *(f"{max(run[part][kind] for run in runs) / 1e9:.2f}" for part in ("load", "step", "decode")),
                f"{readings.life_peak(sections, engine, kind) / 1e9:.2f}",
            )
            for engine, runs in found.items()
        ),
    )


def _processors(runs: list[readings.Row], stock: list[readings.Row]) -> str:
    """What all threads spent, over stock's: other programs on the machine disturb it less."""
    return ratio(readings.ratio([run["processor"] for run in runs], [run["processor"] for run in stock]))


def _turns(found: Mapping[str, Any], places: Iterable[int], unit: str, kind: str) -> list[str]:
    measured = [(at, engine, runs) for at in places for engine, runs in found.get(str(at), {}).items()]
    with_processors = all("processor" in runs[0] for _, _, runs in measured)  # old entries lack it
    titles = (unit, "engine", "seconds", "over stock", PROCESSORS, "peak of the process, GB")
    rows = (
        (
            at,
            engine,
            times(readings.seconds(runs)),
            ratio(readings.ratio(readings.seconds(runs), readings.seconds(found[str(at)]["stock"]))),
            _processors(runs, found[str(at)]["stock"]) if with_processors else "",
            f"{readings.most(runs, kind) / 1e9:.2f}",
        )
        for at, engine, runs in measured
    )
    columns = [column for column, _ in enumerate(titles) if with_processors or column != titles.index(PROCESSORS)]
    return table([titles[column] for column in columns], ([row[column] for column in columns] for row in rows))
