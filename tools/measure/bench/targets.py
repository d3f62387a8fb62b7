"""The benchmark's targets, as data, and whether they are met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tools.measure.bench import readings
from tools.measure.bench.readings import Sections
from tools.measure.bench.sections import DECODED, FEWER, LOW_MEMORY, RIVALS
from tools.measure.bench.stats import Spread, is_met
from tools.measure.bench.variants import BF16_ALONE, REUSE_ALONE, ROUTINES

Figure = Callable[[Sections, str], float | Spread]


@dataclass(frozen=True)
class Target:
    """A figure and its bound. ``figure`` takes a device's sections and the kind of memory that counts there."""

    what: str
    bound: float
    at_most: bool
    unit: str
    figure: Figure


class Verdict(NamedTuple):
    """A target with its figure (None: not measured)."""

    target: Target
    figure: float | Spread | None

    def __str__(self) -> str:
        if self.figure is None:
            return "not measured"
        return WORDS[is_met(self.figure, self.target.bound, self.target.at_most)]


WORDS = {True: "met", False: "**not met**", None: "undecided"}


def judge(target: Target, sections: Sections, memory: str) -> Verdict:
    """Compare a target with what was measured."""
    try:
        return Verdict(target, target.figure(sections, memory))
    except readings.NotMeasured:
        return Verdict(target, None)


def _at_most(what: str, bound: float, unit: str, figure: Figure) -> Target:
    return Target(what, bound, True, unit, figure)


def _at_least(what: str, bound: float, unit: str, figure: Figure) -> Target:
    return Target(what, bound, False, unit, figure)


def _speed(name: str, bound: float, over: str = "stock") -> Target:
    than = "stock KSampler" if over == "stock" else over
    what = f"{name}: speed, 25 steps at 512 px, over {than}"
    return _at_least(what, bound, "x", lambda found, _: readings.speed_up(found, name, over))


def _of_images(name: str, quality: float, margin: float) -> tuple[Target, ...]:
    return (
        _at_least(
            f"{name}: mean PSNR against all steps", quality, "dB", lambda found, _: readings.preset(found, name)["psnr"]
        ),
        _at_least(
            f"{name}: above fewer steps at the same cost",
            margin,
            "dB",
            lambda found, _: readings.above(found, name, FEWER),
        ),
        _at_least(
            f"{name}: above the best of stock {', '.join(RIVALS)} at the same cost",
            0.0,
            "dB",
            lambda found, _: min(readings.above(found, name, rival) for rival in RIVALS),
        ),
        _at_most(
            f"{name}: loss of prompt fidelity",
            1.0,
            "points",
            lambda found, _: readings.fidelity_change(found, name),
        ),
    )


def _of_routines(way: str) -> tuple[Target, ...]:
    def over_stock(section: str, px: int) -> Figure:
        return lambda found, _: readings.turn_ratio(found, section, px, way)

    return (
        *(
            _at_most(f"a step at {px} px, {way}: time over stock", 0.8, "x", over_stock("step", px))
            for px in (512, 1024)
        ),
        *_of_decoding(way, 0.5),
    )


def _of_decoding(way: str, bound: float) -> tuple[Target, ...]:
    def over_stock(px: int) -> Figure:
        return lambda found, _: readings.turn_ratio(found, "decode", px, way)

    return (
        *(_at_most(f"VAE decode at {px} px, {way}: time over stock", bound, "x", over_stock(px)) for px in DECODED),
        _at_most(
            f"VAE decode, {way}: largest difference from stock's image",
            1.0,
            "of 255",
            lambda found, _: readings.decode_difference(found, way),
        ),
    )


def _over_diffusers(px: int) -> Target:
    return _at_most(
        f"a step at {px} px, pack, exact: time over diffusers",
        1.0,
        "x",
        lambda found, _: readings.turn_ratio(found, "step", px, "pack, exact", "diffusers"),
    )


EVERYWHERE = (
    _at_most("loading, time over stock DiffusersLoader", 0.6, "x", lambda s, _: readings.load_ratio(s, "stock")),
    _at_most("loading, time over diffusers", 0.3, "x", lambda s, _: readings.load_ratio(s, "diffusers")),
    _at_most(
        "loading the U-Net alone, time over stock", 1.0, "x", lambda s, _: readings.load_ratio(s, "stock", "unet")
    ),
    _at_most("loading, memory over the weights", 1.1, "x", lambda s, kind: readings.load_peak(s, "everything", kind)),
    _at_most(
        "loading, memory over the weights, U-Net alone", 1.1, "x", lambda s, kind: readings.load_peak(s, "unet", kind)
    ),
    _at_most("loading the same files again, time over the first", 0.05, "x", lambda s, _: readings.load_again(s)),
    _at_most(
        "fp16 weights: peak of loading, 2 steps at 512 px and decoding",
        4.5,
        "GB",
        lambda s, kind: readings.life_peak(s, LOW_MEMORY, kind) / 1e9,
    ),
)
OVERHEAD = _at_most(
    "KOALA Sampler over KSampler, same MODEL and sigmas, KOALA-700M",
    1.0,
    "%",
    lambda s, _: readings.overhead(s, "koala-700m"),
)
OF_IMAGES = (
    *_of_images(REUSE_ALONE[0], 39.0, 6.0),
    *_of_images(REUSE_ALONE[1], 33.0, 2.5),
    *_of_images("balanced", 39.0, 6.0),
    *_of_images("fast", 33.0, 2.5),
)
"""What is judged by images is the same on every machine, but for rounding."""


def _faster(place: str, way: str, bound: float, other: str = "stock") -> Target:
    what = f"{way}, 25 steps at {place}: speed over {'stock KSampler' if other == 'stock' else other}"
    return _at_least(what, bound, "x", lambda found, _: readings.image_speed_up(found, place, way, other))


def _like_eager(place: str) -> Target:
    return _at_least(
        f"exact, {place}: latents against eager", 45.0, "dB", lambda found, _: readings.apart(found, place, "exact")
    )


ON_A_GPU = (
    _faster("1024 px", "exact", 2.2),
    _faster("512 px", "exact", 4.0),
    _faster("1024 px, batch 4", "exact", 1.25),
    *(_like_eager(place) for place in ("1024 px", "512 px", "1024 px, batch 4")),
    _faster("1024 px", "balanced", 3.5),
    _faster("512 px", "balanced", 6.0),
    _faster("1024 px", "fast", 4.5),
    _faster("1024 px", "exact", 1.5, "diffusers"),
    _at_least(
        "exact, 25 steps at 1024 px: speed over diffusers, fast",
        1.1,
        "x",
        lambda found, _: readings.faster_than_rival(found, "exact", "diffusers, fast"),
    ),
    _at_least(
        "exact, a step at 1024 px: share of the speed that its multiplications allow (moonshot: 65 %)",
        50.0,
        "%",
        lambda found, _: readings.share_of_bound(found, "1024 px", 1024, "exact"),
    ),
    _at_most(
        "exact, first run: compilation", 25.0, "s", lambda found, _: readings.compilation(found, "1024 px", "exact")
    ),
    _at_most(
        "exact, another size: compilation", 8.0, "s", lambda found, _: readings.compilation(found, "512 px", "exact")
    ),
    _at_most(
        "exact, first run of another process", 5.0, "s", lambda found, _: readings.warm(found, "1024 px", "exact")
    ),
    _at_most(
        "exact, 1024 px: memory above eager",
        1.2,
        "GB",
        lambda found, _: readings.more_memory(found, "exact"),
    ),
)
TARGETS: Mapping[str, tuple[Target, ...]] = {
    "ram": (
        *EVERYWHERE,
        OVERHEAD,
        _speed(REUSE_ALONE[0], 1.9),
        _speed(REUSE_ALONE[1], 2.3),
        _speed("balanced", 1.9, BF16_ALONE),
        _speed("fast", 2.3, BF16_ALONE),
        _at_least(
            f"stretch goal of reuse: speed of {REUSE_ALONE[1]}, over stock KSampler",
            3.0,
            "x",
            lambda s, _: readings.speed_up(s, REUSE_ALONE[1]),
        ),
        *(_over_diffusers(px) for px in (256, 512, 1024)),
        *(target for way in ROUTINES for target in _of_routines(way)),
    ),
    "gpu": (*ON_A_GPU, *_of_decoding("pack, exact", 0.6), *EVERYWHERE),
}
"""By the kind of memory that counts."""
