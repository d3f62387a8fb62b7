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
}


def images(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "images")
    yield from (
        "### Images",
        "",
        f"Euler, {found['steps']} steps, cfg 7.5, the same sigmas, without text encoding and decoding. *First* is the "
        "first run of that size in the process, compilation included; balanced and fast come after exact, whose code "
        "they share. ComfyUI's ways share a process, which holds two U-Nets, the stock loader's and the pack's, and "
        "what exact, balanced and fast keep: its peaks hold all of that. ComfyUI runs without dynamic VRAM here. PSNR "
        "compares the latents with those of the same sampler, eager, over their range.",
        "",
    )
    first = next(iter(found["places"]), "")
    for place, ways in found["places"].items():
        yield from _ways(place, ways, "stock", found["apart"].get(place, {}), kind)
    if found["alone"]:
        yield from (
            f"{first}, each alone in a new process, which finds on the disk what was compiled before:",
            "",
        )
        yield from table(
            ("way", "first image, s", "second, s", "peak of the second, GB"),
            (
                (TITLES.get(way, way), f"{runs['first']:.2f}", _seconds(runs), _memory(runs.get("peak"), kind))
                for way, runs in found["alone"].items()
            ),
        )
    for rival, ways in found["rivals"].items():
        if ways:
            yield from (f"{RIVALS[rival]}, in turns with exact, each in a process of its own:", "")
            yield from _ways(first, ways, rival, found["apart"].get(first, {}), kind)
    for way, failed in found["failed"].items():
        yield from (f"{TITLES.get(way, way)} failed ({failed['at']}): {failed['words'].splitlines()[-1]}", "")


def _ways(place: str, ways: Mapping[str, Any], other: str, apart: Mapping[str, float], kind: str) -> list[str]:
    """A table of ways that took turns, and how much faster each is than ``other``."""
    return table(
        (place, "seconds", f"faster than {other}", "first, s", "peak, GB", "PSNR, dB", "message"),
        (
            (
                TITLES.get(way, way),
                _seconds(runs),
                _faster(ways, way, other),
                f"{runs['first']:.2f}" if "first" in runs else "",
                _memory(runs.get("peak"), kind),
                _psnr(apart.get(way)),
                runs.get("said", ""),
            )
            for way, runs in ways.items()
        ),
    )


def _seconds(runs: Mapping[str, Any]) -> str:
    """Of later runs; where time ran out, or the way failed, there may be none."""
    return times(runs["again"], 3) if runs["again"] else "not measured"


def server(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "server")
    yield from (
        "### The real server",
        "",
        f"A whole prompt, {found['image']}, as the server notes its start and end; graph after graph, not in turns, in "
        "one server. The first run loads the model, encodes the text and compiles what is to be compiled; later ones "
        "have another seed, sample and decode. "
        + (f"Its log: {'; '.join(found['notes'])}." if found.get("notes") else ""),
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
        + f"Seconds of the second image, {found['image']}, cfg 7.5. KOALA is drawn by the real server: the whole "
        "prompt; *exact* is KOALA Accelerate. diffusers and SDXL's U-Net have a process of their own each: sampling "
        "and decoding, SDXL by ComfyUI without the server's dynamic VRAM, with which it might do with less. diffusers "
        "offloads whole models, and decodes in tiles of 512 px; by default its tile would be the whole image of "
        "1024 px. What failed is not tried in less.",
        "",
    )
    levels = sorted(found["free"], key=float, reverse=True)
    yield from table(
        ("", *(f"{free} GB" for free in levels)),
        ((name, *(_fitted(found["free"][free].get(name)) for free in levels)) for name in names),
    )
    for free, words in found.get("not left", {}).items():
        yield from (f"{free} GB: {words}", "")


def _fitted(made: Mapping[str, Any] | None) -> str:
    if made is None:
        return "not tried"
    if "seconds" in made:
        return f"{made['seconds']:.1f} s"
    return "failed" if made["fits"] else "does not fit"


def _faster(ways: Mapping[str, Any], way: str, other: str) -> str:
    theirs, ours = ways.get(other, {}).get("again"), ways[way]["again"]
    return ratio(readings.faster(ours, theirs)) if theirs and ours else ""


def _memory(peak: Mapping[str, Any] | None, kind: str) -> str:
    """What PyTorch held at most; in brackets, what the driver counts for the process, where it tells."""
    if peak is None:
        return ""
    told = f" ({peak['nvml'] / 1e9:.2f})" if peak.get("nvml") else ""
    return f"{peak[kind] / 1e9:.2f}{told}"


def _psnr(found: float | None) -> str:
    return "" if found is None else "identical" if found > MOST_PSNR else f"{found:.1f}"


RIVALS = {
    "stock, compiled": "Stock behind core's TorchCompileModel",
    "diffusers, fast": "diffusers by the fast settings of its documentation (fused projections, channels_last, "
    'torch.compile with mode="max-autotune" and fullgraph, the inductor with conv_1x1_as_mm, coordinate_descent_tuning '
    "in all directions and without epilogue_fusion)",
}
"""What is compared with exact by itself."""
MOST_PSNR = 150.0
"""Beyond it, latents in fp32 are the same but for their last bits."""
