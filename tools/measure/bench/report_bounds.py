"""The report's sections on multiplications, and on what bounds the speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tools.measure.bench import readings
from tools.measure.bench.formats import percent, ratio, table
from tools.measure.bench.readings import Sections
from tools.measure.bench.sections import DECODED, SIZES
from tools.measure.bench.variants import ROUTINES, SAME_ROUTINES, VAE_IN_BF16

KOALA = "KOALA-700M"


def macs(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "macs")["unets"]
    sdxl = {px: sum(parts.values()) for px, parts in found["SDXL"]["sizes"].items()}
    yield from (
        "### Multiplications",
        "",
        "Tera-multiplications in a forward pass for one image, without guidance; in brackets, the ratio to SDXL's.",
        "",
    )
    columns = ("U-Net", *(f"{px} px" for px in sdxl), "convolution", "linear", "attention", "shallow branch")
    yield from table(columns, (_macs_of(name, unet, sdxl) for name, unet in found.items()))
    yield from (
        "Shares of operations are at 1024 px; the shallow branch is what a step on extrapolated features computes, at "
        "512 px.",
        "",
    )
    if blocks := found[KOALA]["blocks"]:
        shares = ", ".join(f"{block} {percent(share)}" for block, share in blocks.items())
        yield from (f"{KOALA}'s blocks at 512 px: {shares}.", "")


def _macs_of(name: str, unet: Mapping[str, Any], sdxl: Mapping[str, int]) -> Iterator[str]:
    """A U-Net's row. ``sdxl``: SDXL's multiplications by size."""
    totals = {px: sum(by_operation.values()) for px, by_operation in unet["sizes"].items()}
    yield name
    yield from (f"{totals[px] / 1e12:.2f} ({totals[px] / of_sdxl:.2f})" for px, of_sdxl in sdxl.items())
    yield from (percent(operations / totals["1024"]) for operations in unet["sizes"]["1024"].values())
    yield percent(unet["shallow"])


def bounds(sections: Sections, kind: str) -> Iterator[str]:
    """What the machine allows, beside what was reached."""
    lines = []
    for section, what, model, places, pictures in (
        ("step", "a guided step", KOALA, SIZES, 2),
        ("decode", "VAE decode", "vae", DECODED, 1),
    ):
        for px in places if section in sections else ():
            for way, runs in readings.figures(sections, section)["sizes"].get(str(px), {}).items():
                if way in (readings.ours(sections, section), *ROUTINES):
                    in_bf16 = way == "pack, bf16" and _is_in_bf16(sections, model)
                    least = readings.bound(sections, model, px, pictures, in_bf16)
                    lines.append((f"{what}, {px} px", way, least, min(readings.seconds(runs))))
    lines += _of_images(sections)
    if not lines:
        raise readings.NotMeasured("step, decode, images")
    yield from (
        "### What limits the speed",
        "",
        "Multiplications over the fastest rates that were measured above, of products and of convolutions, beside the "
        "shortest run. Convolutions of other kinds, norms, activations and copies come on top; small matrices, and "
        "attention, run below that rate. In bf16, weights are converted as well: until 2026-11-30 at every step, since "
        "then once in a run.",
        "",
    )
    yield from table(
        ("what", "engine", "bound, s", "measured, s", "share of the bound's speed"),
        ((*what, f"{least:.2f}", f"{found:.2f}", _share(least / found)) for *what, least, found in lines),
    )


def _of_images(sections: Sections) -> Iterator[tuple[str, str, float, float]]:
    """The same of exact's whole images, which are what is measured on a GPU."""
    found = readings.figures(sections, "images") if "images" in sections else {"places": {}}
    for place, ways in found["places"].items():
        if again := ways.get("exact", {}).get("again"):
            px, batch = found["sizes"][place]
            least = found["steps"] * readings.bound(sections, KOALA, px, 2 * batch)
            yield f"{found['steps']} guided steps, {place}", "exact", least, min(again)


def _is_in_bf16(sections: Sections, model: str) -> bool:
    """Whether KOALA Accelerate chooses bf16 for a model on the machine."""
    faster = readings.figures(sections, "machine")["faster"]
    own = VAE_IN_BF16 if model == "vae" else "bf16"
    return bool(faster.get(own, faster["bf16"]))  # until 2026-11-30 one probe was for both


def _share(share: float) -> str:
    return percent(share) if share <= 1 else "undecided: the machine was slower when its rates were measured"


def preset_bounds(sections: Sections, kind: str) -> Iterator[str]:
    if readings.date(sections, "sample") < readings.date(sections, "quality"):
        yield from ("Reuse was timed before its multiplications were last counted, so that the two do not compare.", "")
        return
    yield from (
        "With the same routines, reuse can be faster at most by the factor by which multiplications are fewer:",
        "",
    )
    yield from table(
        ("variant", "multiplications", "measured", "over"),
        (
            (
                name,
                f"{1 / readings.preset(sections, name)['cost']:.2f} x fewer",
                ratio(readings.speed_up(sections, name, other)),
                other,
            )
            for name, other in SAME_ROUTINES.items()
        ),
    )
