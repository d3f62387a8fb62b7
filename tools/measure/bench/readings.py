"""Figures read out of the results of sections: each function takes one device's sections, and raises NotMeasured where
one that it needs is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.measure.bench.sections import ALL, FEWER, OURS
from tools.measure.bench.stats import Spread, at_cost, ratio, spread, sure

Sections = Mapping[str, Mapping[str, Any]]
Row = Mapping[str, Any]


class NotMeasured(Exception):
    """A section that a figure is read from was not measured."""


def figures(sections: Sections, section: str) -> Any:
    """One section's figures."""
    return _entry(sections, section)["figures"]


def date(sections: Sections, section: str) -> str:
    """The day on which a section was measured, year first."""
    return str(_entry(sections, section)["date"])


def _entry(sections: Sections, section: str) -> Any:
    if section not in sections:
        raise NotMeasured(section)
    return sections[section]


def seconds(runs: list[Row]) -> list[float]:
    """The times of repeated runs."""
    return [run["seconds"] for run in runs]


def most(runs: list[Row], kind: str = "ram", key: str = "peak") -> float:
    """The largest peak of repeated runs, bytes."""
    return max(run[key][kind] for run in runs)


def load_ratio(sections: Sections, other: str, what: str = "everything") -> Spread:
    """The pack's loading time over another engine's."""
    found = figures(sections, "load")[what]
    return ratio(seconds(found["pack"]), seconds(found[other]))


def first_image(sections: Sections, engine: str) -> list[float]:
    """Seconds of loading everything and of the first step together, run by run: engines differ in what they put off
    until then. Old entries lack them."""
    found = figures(sections, "load")
    if "first step" not in found:
        raise NotMeasured("load: first step")
    parts = (seconds(found[key][engine]) for key in ("everything", "first step"))
    return [one + other for one, other in zip(*parts, strict=True)]


def load_peak(sections: Sections, what: str, kind: str) -> float:
    """Memory of the pack's loading above what the process used before, over the size of the weights."""
    runs = figures(sections, "load")[what]["pack"]
    return max(run["above"][kind] / run["weights"] for run in runs)


def load_again(sections: Sections) -> Spread:
    """The pack's second loading of the same files over its first."""
    found = figures(sections, "load")
    return ratio(seconds(found["again"]["pack"]), seconds(found["everything"]["pack"]))


def life_peak(sections: Sections, engine: str, kind: str) -> float:
    """The most memory of loading, two steps and decoding, bytes."""
    return max(part[kind] for run in figures(sections, "memory")[engine] for part in run.values())


def turn_ratio(sections: Sections, section: str, px: int, way: str, other: str = "stock") -> Spread:
    """Seconds of a step or of decoding over another engine's."""
    found = figures(sections, section)["sizes"].get(str(px))
    if found is None:
        raise NotMeasured(f"{section} at {px} px")
    return ratio(seconds(found[way]), seconds(found[other]))


def decode_difference(sections: Sections, way: str) -> float:
    """Largest difference of a decoded picture from stock's, of 255."""
    found = [ways[way] for ways in figures(sections, "decode")["difference"].values()]
    if not found:
        raise NotMeasured("decode: difference")
    return 255 * max(found)


def ours(sections: Sections, section: str = "step") -> str:
    """The pack's way of computing exactly: old entries, of a GPU, have no other routines."""
    ways = next(iter(figures(sections, section)["sizes"].values()))
    return next(way for way in ("pack, exact", "pack") if way in ways)


def speed_up(sections: Sections, way: str, over: str = "stock") -> Spread:
    """How many times faster sampling is."""
    runs = figures(sections, "sample")["runs"]
    return ratio(runs[over], runs[way])


def overhead(sections: Sections, model: str) -> Spread:
    """Time that KOALA Sampler adds to KSampler, percent: the median of the pairs, and how sure it is."""
    found = figures(sections, "sample")["overhead"]
    times = next(times for name, times in found.items() if name.startswith(model))
    ratios = [ours / theirs for ours, theirs in zip(times["KOALA Sampler"], times["KSampler"], strict=True)]
    return Spread(*(100 * (part - 1) for part in sure(ratios)))


def rows(sections: Sections, family: str, run: str | None = None) -> list[Row]:
    """A family's rows of the quality section, by default those of the base run."""
    found = figures(sections, "quality")
    return [row for row in found["rows"] if row["family"] == family and row["run"] == (run or found["base"])]


def preset(sections: Sections, name: str, run: str | None = None) -> Row:
    """A variant's row of the quality section."""
    found = {row["value"]: row for row in rows(sections, OURS, run)}
    return found[name]


def above(sections: Sections, name: str, rival: str = FEWER, run: str | None = None) -> float:
    """A preset's dB above a rival's at the same cost."""
    ours = preset(sections, name, run)
    points = [(row["cost"], row["psnr"]) for row in rows(sections, rival, run)]
    if rival == FEWER:  # with as many steps it is the same image
        points += [(row["cost"], row["psnr"]) for row in rows(sections, ALL, run)]
    return ours["psnr"] - at_cost(points, ours["cost"])


def fidelity_change(sections: Sections, name: str) -> float:
    """Points of prompt fidelity that a preset loses, negative where it gains some."""
    (reference,) = rows(sections, ALL)
    return reference["fidelity"] - preset(sections, name)["fidelity"]


def runs_surveyed(sections: Sections) -> list[str]:
    """Every run that the quality section judged presets on, the base run first."""
    return list(dict.fromkeys(row["run"] for row in figures(sections, "quality")["rows"]))


def bound(sections: Sections, model: str, px: int, pictures: int = 2, bf16: bool = False) -> float:
    """Seconds that a step cannot be shorter than: its multiplications at the fastest rates that were measured on the
    machine, of convolutions and of matrix products of any shape."""
    rates, found = figures(sections, "machine"), figures(sections, "macs")
    part = found["vae"][str(px)] if model == "vae" else found["unets"][model]["sizes"][str(px)]
    rate_of = {"convolution": fastest_convolution(rates, bf16)}
    rate = fastest(rates, bf16)
    seconds = (operations / rate_of.get(operation, rate) for operation, operations in part.items())
    return 2e-9 * pictures * sum(seconds)


def fastest(rates: Row, bf16: bool = False) -> float:
    """The fastest of a machine's rates, GFLOP/s, in its usual type or in bf16."""
    ways = ("bf16",) if bf16 else ("contiguous", "channels_last")
    products = [rate for how, rate in rates["matmul"].items() if (how == "bf16") == bf16]
    return max(*products, *(one[way] for kind in ("unet", "vae") for one in rates[kind] for way in ways))


def fastest_convolution(rates: Row, bf16: bool = False) -> float:
    """The same for convolutions, which Winograd's algorithm computes with fewer multiplications, in fp32."""
    by_winograd = [one.get("Winograd", 0) for kind in ("unet", "vae") for one in rates[kind]]
    return max(fastest(rates, bf16), 0 if bf16 else max(by_winograd))


def image_runs(sections: Sections, place: str, way: str) -> Row:
    """A way's runs of a whole image's steps."""
    ways = figures(sections, "images")["places"].get(place, {})
    if way not in ways:
        raise NotMeasured(f"images: {way} at {place}")
    found: Row = ways[way]
    return found


def later(sections: Sections, place: str, way: str) -> list[float]:
    """Seconds of a way's runs of a whole image's steps but the first."""
    found: list[float] = image_runs(sections, place, way)["again"]
    if not found:
        raise NotMeasured(f"images: {way} at {place}, again")
    return found


def image_speed_up(sections: Sections, place: str, way: str, other: str) -> Spread:
    """How many times faster an image's steps are, later runs pair by pair; where time ran out there are fewer."""
    return faster(later(sections, place, way), later(sections, place, other))


def faster_than_rival(sections: Sections, way: str, rival: str) -> Spread:
    """The same where a rival and the way took turns by themselves."""
    runs = figures(sections, "images")["rivals"].get(rival, {})
    pairs = [runs.get(one, {}).get("again") for one in (way, rival)]
    if not all(pairs):
        raise NotMeasured(f"images: {way} in turn with {rival}")
    return faster(*pairs)


def faster(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times faster ours are, turn by turn; the last turn may have been cut short."""
    turns = min(len(ours), len(theirs))
    return ratio(theirs[:turns], ours[:turns])


def apart(sections: Sections, place: str, way: str) -> float:
    """Decibels between latents and those of the same sampler, eager."""
    found = figures(sections, "images")["apart"].get(place, {})
    if way not in found:
        raise NotMeasured(f"images: {way} at {place}")
    return float(found[way])


def share_of_bound(sections: Sections, place: str, px: int, way: str) -> Spread:
    """Percent of the speed that a step's multiplications allow at the machine's fastest rate."""
    steps, least = figures(sections, "images")["steps"], bound(sections, "KOALA-700M", px)
    return spread([100 * least * steps / run for run in later(sections, place, way)])


def compilation(sections: Sections, place: str, way: str) -> float:
    """Seconds by which the first run of a size is longer than later ones."""
    return float(image_runs(sections, place, way)["first"] - spread(later(sections, place, way)).median)


def warm(sections: Sections, place: str, way: str) -> float:
    """Seconds by which the first run of another process, which finds what was compiled, is longer than later ones."""
    return float(_alone(sections, way)["first"] - spread(later(sections, place, way)).median)


def more_memory(sections: Sections, way: str) -> float:
    """Gigabytes of the GPU that a way takes at its peak beyond KOALA Sampler, eager: each alone in its process, at the
    second image."""
    ours, eager = (_alone(sections, one) for one in (way, "KOALA Sampler"))
    if not (ours["again"] and eager["again"]):
        raise NotMeasured(f"images: {way} alone, again")
    return float((ours["peak"]["gpu"] - eager["peak"]["gpu"]) / 1e9)


def _alone(sections: Sections, way: str) -> Row:
    found = figures(sections, "images")["alone"]
    if way not in found:
        raise NotMeasured(f"images: {way} alone")
    runs: Row = found[way]
    return runs


def step_seconds(sections: Sections, engine: str, px: int) -> Spread:
    """Seconds a guided step."""
    return spread(seconds(figures(sections, "step")["sizes"][str(px)][engine]))
