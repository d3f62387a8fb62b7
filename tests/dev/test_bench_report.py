"""The benchmark's page: what is written of which figures; and one small, real survey."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.dev import bench_fakes
from tests.dev.bench_fakes import SMALL, FakeWorker
from tools.harness import testhost
from tools.harness.errors import UserError
from tools.measure import history
from tools.measure.bench import __main__ as command
from tools.measure.bench import (
    readings,
    report,
    store,
)
from tools.measure.bench.asked import Bench, Run
from tools.measure.bench.process import NO_ENGINE
from tools.measure.bench.report_bounds import bounds
from tools.measure.bench.sections import ALL, FEWER, OURS, RIVALS, SECTIONS
from tools.measure.bench.stats import Spread
from tools.measure.bench.targets import OF_IMAGES, TARGETS, judge
from tools.measure.bench.variants import REUSE_ALONE, VARIANTS

fake = pytest.fixture(bench_fakes.fake)
docs_are_left_alone = pytest.fixture(autouse=True)(bench_fakes.docs_are_left_alone)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_sections_make_a_report_that_judges_every_target(
    fake: type[FakeWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(command, "require_gpu", lambda: None)
    text = command.run(command.chosen([], device), Bench(device, 2, SMALL), tmp_path).read_text("utf-8")
    (measured,), shared = store.read(tmp_path).values(), store.shared(tmp_path)
    counted = {} if device == "cpu" else {"macs": store.shared(testhost.ROOT / "docs")["macs"]}
    found = {**counted, **shared, **measured}
    targets = TARGETS_OF[device] + (OF_IMAGES if device == "cpu" else ())
    verdicts = [judge(target, found, "ram" if device == "cpu" else "gpu") for target in targets]
    assert [str(one.target.what) for one in verdicts if one.figure is None] == []
    assert "Not measured on this machine" not in text
    titles = [line for line in text.splitlines() if line.startswith("#")]
    other = "## On the GPU" if device == "cpu" else "## On the CPU"
    assert other in titles
    assert f"{other}\n\nNot measured." in text
    assert titles[:2] == ["# Benchmarks", "## Images and multiplications"]
    parts = [title.removeprefix("### ") for title in titles if title.startswith("### ")]
    images = ["Targets", "Multiplications", "Quality"] if device == "cpu" else ["Multiplications"]
    assert parts == [*images, "Targets", "Rates", *TITLES[device]]
    plots = sorted(file.name for file in tmp_path.glob("*.png"))
    assert len(plots) == (3 if device == "cpu" else 0)
    for plot in plots:
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
        assert f"({plot})" in text


TITLES = {
    "cpu": ["Loading", "A step", "VAE decode", "Sampling", "Memory", "What limits the speed"],
    "cuda": [
        "Images",
        "The real server",
        "Little memory",
        "Loading",
        "VAE decode",
        "Memory",
        "What limits the speed",
    ],
}


TARGETS_OF = {"cpu": TARGETS["ram"], "cuda": TARGETS["gpu"]}


def test_verdicts_follow_the_figures(fake: type[FakeWorker]) -> None:
    bench = Bench(repeats=2, survey=SMALL)
    found = {
        name: {"machine": FakeWorker(NO_ENGINE, "cpu").machine(), "figures": SECTIONS[name](bench)}
        for name in ("load", "step", "quality")
    }
    verdicts = {one.target.what: one for one in (judge(target, found, "ram") for target in TARGETS["ram"])}
    assert verdicts["loading, time over stock DiffusersLoader"].figure == Spread(0.5, 0.5, 0.5)
    assert str(verdicts["loading, time over stock DiffusersLoader"]) == "met"
    assert str(verdicts["loading the same files again, time over the first"]) == "**not met**"
    assert verdicts["a step at 512 px, pack, exact: time over stock"].figure == Spread(0.25, 0.25, 0.25)
    assert verdicts["a step at 512 px, pack, exact: time over diffusers"].figure == Spread(0.125, 0.125, 0.125)
    assert str(verdicts["balanced: speed, 25 steps at 512 px, over bf16 alone"]) == "not measured"
    images = {one.target.what: one for one in (judge(target, found, "ram") for target in OF_IMAGES)}
    assert images["balanced, fp32: above fewer steps at the same cost"].figure == pytest.approx(10, abs=1.5)


def test_machines_are_never_mixed_in_a_table(fake: type[FakeWorker], tmp_path: Path) -> None:
    """Each has a chapter with what was measured on it; the one that was measured last comes first."""
    bench, machine = Bench(repeats=2, survey=SMALL), FakeWorker(NO_ENGINE, "cpu").machine()
    old, new = machine | {"cpu": "an old CPU"}, machine | {"cpu": "a new CPU", "units": "AVX-512"}
    for name in ("macs", "machine", "load", "step"):
        store.add(tmp_path, "cpu", name, old, SECTIONS[name](bench))
    store.add(tmp_path, "cpu", "load", new, SECTIONS["load"](bench))
    text = report.write(tmp_path).read_text("utf-8")
    shared, at_new, rest = re.split(r"## On the CPU: ", text)
    at_old = rest.split("## On the GPU")[0]
    assert "### Multiplications" in shared
    assert at_new.startswith("a new CPU (AVX-512), 2 threads")
    assert at_old.startswith("an old CPU, 2 threads")
    assert "### Loading" in at_new
    assert "### Loading" in at_old
    assert "### A step" not in at_new
    assert "a step at 512 px" not in at_new
    assert "Not measured on this machine: machine, step, decode, sample, memory, quality." in at_new
    assert "### A step" in at_old
    assert at_old.count("![size](benchmarks-size.png)") == 1
    store.add(tmp_path, "cpu", "step", new, SECTIONS["step"](bench))
    at_new, rest = re.split(r"## On the CPU: ", report.write(tmp_path).read_text("utf-8"))[1:]
    assert "![size](benchmarks-size.png)" in at_new
    assert "![size]" not in rest


def test_speed_is_not_compared_with_multiplications_of_a_later_version(fake: type[FakeWorker], tmp_path: Path) -> None:
    bench, machine = Bench(repeats=2, survey=SMALL), FakeWorker(NO_ENGINE, "cpu").machine()
    for name in ("sample", "quality"):
        store.add(tmp_path, "cpu", name, machine, SECTIONS[name](bench))
    assert "x fewer |" in report.write(tmp_path).read_text("utf-8")
    entries = history.read(tmp_path / store.NAME)
    entries[0]["date"] = "2026-01-01"
    (tmp_path / store.NAME).write_text(history.as_text(entries), "utf-8")
    text = report.write(tmp_path).read_text("utf-8")
    assert "x fewer |" not in text
    assert "so that the two do not compare" in text


def test_what_seems_faster_than_its_bound_is_undecided(fake: type[FakeWorker]) -> None:
    machine = FakeWorker(NO_ENGINE, "cpu").machine()
    found = {name: {"machine": machine, "figures": SECTIONS[name](Bench())} for name in ("machine", "macs")}
    for name in ("step", "decode"):
        found[name] = {"machine": machine, "figures": SECTIONS[name](Bench(repeats=1))}
    assert readings.bound(found, "KOALA-700M", 512) == pytest.approx(
        2 * 2 * 512 / 150 + 2 * 2 * 512 / 100  # GFLOP/s of convolutions, and of the rest
    )
    rows = [line for line in bounds(found, "ram") if line.startswith("| a guided step, 512 px")]
    assert rows
    assert all("undecided" in row for row in rows)  # half a second, where 34 are the least
    for runs in found["step"]["figures"]["sizes"]["512"].values():
        runs[0]["seconds"] = 100.0
    rows = [line for line in bounds(found, "ram") if line.startswith("| a guided step, 512 px | pack, exact")]
    assert rows[0].endswith("| 34.1 % |")


def test_processors_time_is_shown_where_it_was_measured(fake: type[FakeWorker], tmp_path: Path) -> None:
    machine, found = FakeWorker(NO_ENGINE, "cpu").machine(), SECTIONS["step"](Bench(repeats=2))
    store.add(tmp_path, "cpu", "step", machine, found)
    shown = report.write(tmp_path).read_text("utf-8")
    assert "| 512 | pack, exact | 0.50 (0.50..0.50) | 0.25 x (0.25..0.25) | 0.25 x (0.25..0.25) | 3.00 |" in shown
    for at in (*found["sizes"].values(), *found["batches"].values()):
        for run in (run for runs in at.values() for run in runs):
            run.pop("processor", None)
    store.add(tmp_path, "cpu", "step", machine, found)
    shown = report.write(tmp_path).read_text("utf-8")
    assert "| 512 | pack, exact | 0.50 (0.50..0.50) | 0.25 x (0.25..0.25) | 3.00 |" in shown


def test_part_of_the_sections_makes_a_report(fake: type[FakeWorker], tmp_path: Path) -> None:
    text = command.run(["macs"], Bench(), tmp_path).read_text("utf-8")
    assert "### Multiplications" in text
    assert "### Loading" not in text
    assert "Not measured" in text
    assert not list(tmp_path.glob("*.png"))


@pytest.fixture(scope="module")
def survey() -> dict[str, Any]:
    """A real quality survey, in a worker."""
    return SECTIONS["quality"](Bench(survey=SMALL))


@pytest.mark.nightly
@pytest.mark.slow
def test_a_real_survey_judges_every_way_of_leaving_work_out(survey: dict[str, Any]) -> None:
    assert survey["shallow"] == pytest.approx(0.036, abs=0.005)  # what speed.plan's tables were weighed with
    found = {"quality": {"machine": {}, "figures": survey}}
    (reference,) = readings.rows(found, ALL)
    assert (reference["cost"], reference["psnr"]) == (1, 100)
    assert reference["deep"] == reference["shallow"] == 2 * 25  # prompt and negative prompt
    assert readings.preset(found, "exact")["psnr"] > 60
    assert readings.preset(found, "bf16 alone")["psnr"] < 60  # on every processor
    full = {name: readings.preset(found, name)["deep"] / 2 for name in REUSE_ALONE}
    assert 12 <= full["balanced, fp32"] < 14
    assert 9 <= full["fast, fp32"] < 12
    for name in REUSE_ALONE:
        row = readings.preset(found, name)
        assert 2 * (25 + 5) <= row["shallow"] <= 2 * (25 + 10)  # every step runs the last layers, and checks do
        computed = row["deep"] * (1 - survey["shallow"]) + row["shallow"] * survey["shallow"]
        assert row["cost"] == pytest.approx(computed / 50)
    for family in (FEWER, *RIVALS):
        assert all(0.1 < row["cost"] < 1 for row in readings.rows(found, family))
        assert all(5 < row["psnr"] < 60 for row in readings.rows(found, family))
    assert readings.runs_surveyed(found) == [str(Run()), str(SMALL.others[0])]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_real_survey_makes_a_report(survey: dict[str, Any], tmp_path: Path) -> None:
    machine = FakeWorker(NO_ENGINE, "cpu").machine()
    store.add(tmp_path, "cpu", "quality", machine, json.loads(json.dumps(survey)))
    text = report.write(tmp_path).read_text("utf-8")
    assert f"{SMALL.prompts} prompts" in text
    assert "Out of date" not in text
    store.add(tmp_path, "cpu", "quality", machine, survey | {"model": "another"})
    assert "Out of date" in report.write(tmp_path).read_text("utf-8")
    assert f"| {SMALL.others[0]} |" in text
    assert (tmp_path / "benchmarks-quality.png").stat().st_size > 5000


def test_a_section_is_added_and_its_newest_entry_counts(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    machine = FakeWorker(NO_ENGINE, "cpu").machine()
    store.add(folder, "cpu", "load", machine, {"a": 1})
    store.add(folder, "cpu", "step", machine, {"a": 2})
    store.add(folder, "cpu", "load", machine, {"a": 3})
    (found,) = store.read(folder).values()
    assert {name: entry["figures"] for name, entry in found.items()} == {"load": {"a": 3}, "step": {"a": 2}}
    entries = history.read(folder / store.NAME)
    assert [(entry["section"], entry["figures"]["a"]) for entry in entries] == [("load", 1), ("step", 2), ("load", 3)]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"]) for entry in entries)
    assert [file.name for file in folder.iterdir()] == [store.NAME]


@pytest.mark.parametrize("text", ["{", '{"cpu": {}}', '[{"figures": {}}]'])
def test_results_that_are_not_dated_measurements_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / store.NAME).write_text(text, "utf-8")
    with pytest.raises(UserError, match=store.NAME):
        report.write(tmp_path)


def test_other_runs_judge_reuse_alone(fake: type[FakeWorker]) -> None:
    rows = SECTIONS["quality"](Bench(survey=SMALL))["rows"]
    judged: dict[str, list[str]] = {}
    for row in rows:
        if row["family"] == OURS:
            judged.setdefault(row["run"], []).append(row["value"])
    assert judged == {str(Run()): list(VARIANTS), str(SMALL.others[0]): list(REUSE_ALONE)}
