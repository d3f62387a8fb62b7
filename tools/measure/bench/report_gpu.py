"""The report's sections on whole images, the real server, and little memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tools.measure.bench import readings
from tools.measure.bench.formats import ratio, table, times
from tools.measure.bench.readings import Sections

TITLES = {
    "stock": "KSampler, stock loader",
    "stock, compiled": "the same behind core's TorchCompileModel",
    "exact": "KOALA Accelerate: exact",
    "balanced": "KOALA Accelerate: balanced",
    "fast": "KOALA Accelerate: fast",
    "diffusers, fast": "diffusers: fused projections, channels_last, compiled",
}


def images(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "images")
    yield from (
        "### Images, in one process of each engine",
        "",
        f"Euler, {found['steps']} steps, cfg 7.5, the same sigmas, without text encoding and decoding. *First* is the "
        "first run of that size in the process, compilation included; balanced and fast come after exact, whose code "
        "they share. ComfyUI runs without dynamic VRAM here. PSNR compares the latents with those of the same sampler, "
        "eager, over their range.",
        "",
    )
    for place, ways in found["places"].items():
        yield from table(
            (place, "seconds", "faster than stock", "first, s", "peak, GB", "PSNR, dB", "message"),
            (
                (
                    TITLES.get(way, way),
                    times(runs["again"], 3),
                    _faster(ways, way),
                    f"{runs['first']:.2f}",
                    _memory(runs["peak"], kind),
                    _psnr(found["apart"].get(place, {}).get(way)),
                    runs["said"],
                )
                for way, runs in ways.items()
            ),
        )
    for way, words in found["failed"].items():
        yield from (f"{TITLES.get(way, way)} failed: {words.splitlines()[-1]}", "")
    if found["warm"]:
        told = ", ".join(f"{TITLES.get(way, way)} {seconds:.2f} s" for way, seconds in found["warm"].items())
        yield from (f"The first run of another process, which finds what was compiled on the disk: {told}.", "")


def server(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "server")
    yield from (
        "### The real server",
        "",
        f"A whole prompt, {found['image']}, as the server notes its start and end. The first run loads the model, "
        "encodes the text and compiles what is to be compiled; later ones have another seed, sample and decode. "
        + (f"Its log: {'; '.join(found['notes'])}." if found["notes"] else ""),
        "",
    )
    yield from table(
        ("graph", "first, s", "later, s", "GPU memory of the server, GB"),
        ((way, *_prompts(runs)) for way, runs in found["graphs"].items()),
    )


def _prompts(runs: list[Mapping[str, Any]]) -> Iterator[str]:
    failed = [run["error"] for run in runs if "error" in run]
    if failed:
        yield from (f"failed: {failed[0][:100]}", "", "")
        return
    later = [run["seconds"] for run in runs[1:]]
    yield f"{runs[0]['seconds']:.2f}"
    yield times(later) if later else ""
    held = [run["nvml"] for run in runs if run["nvml"]]
    yield f"{max(held) / 1e9:.2f}" if held else "not told"


def fit(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "fit")
    is_held = any(left is not None for left in found["left"].values())
    names = list(dict.fromkeys(name for ways in found["free"].values() for name in ways))
    yield from (
        "### Little memory",
        "",
        ("Another process holds the GPU's memory but for so much. " if is_held else "There was no GPU to hold. ")
        + f"Seconds of the second image, {found['image']}, cfg 7.5: by the real server the whole prompt, by diffusers "
        "and with SDXL's U-Net, each in a process of its own, sampling and decoding. What failed is not tried in less.",
        "",
    )
    yield from table(
        ("", *(f"{free} GB" for free in found["free"])),
        ((name, *(_fitted(ways.get(name)) for ways in found["free"].values())) for name in names),
    )


def _fitted(made: Mapping[str, Any] | None) -> str:
    if made is None:
        return "not tried"
    if "seconds" in made:
        return f"{made['seconds']:.1f} s"
    return "failed" if made["fits"] else "does not fit"


def _faster(ways: Mapping[str, Any], way: str) -> str:
    """Pairs of turns; one that was cut short has fewer."""
    if "stock" not in ways:
        return ""
    pairs = list(zip(ways["stock"]["again"], ways[way]["again"], strict=False))
    return ratio(readings.ratio([stock for stock, _ in pairs], [ours for _, ours in pairs]))


def _memory(peak: Mapping[str, Any], kind: str) -> str:
    """What PyTorch held at most; in brackets, what the driver counts for the process, where it tells."""
    told = f" ({peak['nvml'] / 1e9:.2f})" if peak.get("nvml") else ""
    return f"{peak[kind] / 1e9:.2f}{told}"


def _psnr(found: float | None) -> str:
    return "" if found is None else "identical" if found > MOST_PSNR else f"{found:.1f}"


MOST_PSNR = 150.0
"""Beyond it, latents in fp32 are the same but for their last bits."""
