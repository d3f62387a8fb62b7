"""docs/speed.md and the README quote the benchmark: its newest figures, on one machine."""

from __future__ import annotations

from tools.harness.testhost import ROOT
from tools.measure.bench import readings, store
from tools.measure.bench.formats import decibels, percent, ratio
from tools.measure.bench.sections import ALL
from tools.measure.bench.stats import spread

WAYS = {
    "KSampler": "stock",
    "*exact*": "exact",
    "*balanced*": "balanced",
    "*fast*": "fast",
    "*balanced*, fp32": "balanced, fp32",
    "*fast*, fp32": "fast, fp32",
}
"""Rows of the table, and what they are called in the figures."""
DOCS = ROOT / "docs"


def test_the_table_of_presets_and_the_readme_tell_what_was_measured_last() -> None:
    shared = store.shared(DOCS)
    sections = next({**shared, **measured} for measured in store.read(DOCS).values() if "sample" in measured)
    runs = readings.figures(sections, "sample")["runs"]

    def seconds(way: str) -> str:
        return f"{spread(runs[way]).median:.0f}"

    page = (DOCS / "speed.md").read_text("utf-8")
    for label, way in WAYS.items():
        (row,) = readings.rows(sections, ALL) if way == "stock" else [readings.preset(sections, way)]
        looks = "" if way == "stock" else decibels(row["psnr"])
        looks += " dB" if looks[-1:].isdigit() else ""
        told = (label, seconds(way), ratio(readings.speed_up(sections, way)), looks, percent(row["fidelity"] / 100))
        assert f"| {' | '.join(told)} |".replace("|  |", "| |") in page
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"takes {seconds('stock')} s at 512 px" in readme
    assert f"[{seconds('balanced')} s](docs/speed.md#what-it-gains-and-costs)" in readme
