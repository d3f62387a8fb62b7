"""The report's sections on the quality of images."""

from __future__ import annotations

from collections.abc import Iterator

from tools.measure.bench import readings
from tools.measure.bench.formats import decibels, percent, table
from tools.measure.bench.readings import Sections
from tools.measure.bench.sections import ALL, FEWER, OURS, RIVALS
from tools.measure.bench.stats import at_cost
from tools.measure.bench.variants import REUSE_ALONE


def quality(sections: Sections, kind: str) -> Iterator[str]:
    found = readings.figures(sections, "quality")
    yield from (
        "### Quality",
        "",
        f"koala-tiny, {found['prompts']} prompts, {found['base']}: PSNR of the decoded images against those with all "
        "steps, mean over the images; fidelity: prompts drawn correctly. The cost counts U-Net multiplications, with "
        f"KOALA-700M's {percent(found['shallow'])} for a step on extrapolated features. That bf16 may be cheaper is "
        "not counted; *balanced* and *fast* are judged in bf16 on every processor, *fp32* is their reuse alone. "
        "Identical: no image differs by more than a hundred-thousandth (root mean square). Last column: PSNR of fewer "
        "steps at the same cost, interpolated between whole numbers of steps, where there are some on both sides. "
        "What decides by the image, as KOALA Accelerate's reuse, EasyCache and LazyCache do, samples each by itself.",
        "",
    )
    curve = [(row["cost"], row["psnr"]) for row in readings.rows(sections, FEWER)]
    dearest = max(cost for cost, _ in curve)
    yield from table(
        ("what", "setting", "cost", "at most faster", "PSNR, dB", "fidelity, %", "fewer steps, dB"),
        (
            (
                family,
                row["value"],
                f"{row['cost']:.3f}",
                f"{1 / row['cost']:.2f} x",
                decibels(row["psnr"]),
                f"{row['fidelity']:.1f}",
                "" if family in (ALL, FEWER) or row["cost"] > dearest else f"{at_cost(curve, row['cost']):.1f}",
            )
            for family in (ALL, OURS, *RIVALS, FEWER)
            for row in readings.rows(sections, family)
        ),
    )


def other_runs(sections: Sections, kind: str) -> Iterator[str]:
    yield from (
        "Other samplers and numbers of steps, each against its own images with all steps, with "
        f"{readings.figures(sections, 'quality')['prompts_of_others']} prompts; in brackets, how far above fewer steps "
        "of the same sampler at the same cost. dpmpp_2m and res_multistep are multistep samplers and get more full "
        "steps:",
        "",
    )
    names = list(REUSE_ALONE)

    def cells(run: str) -> Iterator[str]:
        for name in names:
            row = readings.preset(sections, name, run)
            gain = readings.above(sections, name, run=run)
            yield f"{1 / row['cost']:.2f} x, {row['psnr']:.1f} dB ({gain:+.1f}), {row['fidelity']:.1f} %"

    yield from table(
        ("run", "fidelity, all steps", *names),
        (
            (run, f"{readings.rows(sections, ALL, run)[0]['fidelity']:.1f} %", *cells(run))
            for run in readings.runs_surveyed(sections)
        ),
    )
