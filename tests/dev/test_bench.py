"""The benchmark without its measurements: what it computes, writes and refuses; and one small, real survey."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch

from koala_sdxl.host.accelerate.plan import WARMUP_STEPS, full_steps
from koala_sdxl.koala.schedule import schedule
from tools import commands
from tools.harness.errors import UserError
from tools.measure import history
from tools.measure.bench import __main__ as command
from tools.measure.bench import published, readings, report, search, sections, store
from tools.measure.bench.formats import decibels, with_spread
from tools.measure.bench.process import NO_ENGINE, Worker
from tools.measure.bench.report_bounds import bounds
from tools.measure.bench.sections import ALL, FEWER, OURS, RIVALS, SECTIONS, SIZES, Bench, Run, Survey
from tools.measure.bench.stats import Spread, at_cost, bracket, is_met, ratio, spread, sure
from tools.measure.bench.targets import OF_IMAGES, TARGETS, judge
from tools.measure.bench.variants import REUSE_ALONE, ROUTINES, VARIANTS

SMALL = Survey(2, 1, steps=(6,), thresholds=(0.2,), starts=(0.6,), others=(Run("dpmpp_2m", 12),))
GB = 10**9
SIGMAS = schedule(25, "leading").sigmas[:-1].tolist()


class FakeWorker:
    """Answers as a worker does, at once: the pack takes half of stock's time, by its own routines a quarter."""

    open: ClassVar[Counter[str]] = Counter()
    most_open = 0
    asked: ClassVar[list[tuple[str, str, dict[str, Any]]]] = []

    def __init__(self, engine: str, device: str) -> None:
        self.engine, self.device = engine, device

    def __enter__(self) -> FakeWorker:
        self.open[self.engine] += 1
        FakeWorker.most_open = max(self.most_open, self.open.total())
        return self

    def __exit__(self, *_: object) -> None:
        self.open[self.engine] -= 1

    def ask(self, task: str, **given: Any) -> Any:
        self.asked.append((self.engine, task, given))
        return getattr(self, task)(**given)

    def machine(self) -> dict[str, Any]:
        gpu = "a GPU" if self.device == "cuda" else ""
        return {"cpu": "a CPU", "threads": 2, "memory": 16 * GB, "gpu": gpu, "versions": {"torch": "2"}}

    def rates(self) -> dict[str, Any]:
        rates = {"contiguous": 50.0, "channels_last": 100.0, "bf16": 200.0}
        shape = {"shape": "1 x 2 to 3 channels", "gflop": 4.0, **rates}
        return {"matmul": {"PyTorch": 100.0, "bf16": 300.0}, "unet": [shape], "vae": [shape], "fp16 to fp32": 5.0}

    def probes(self) -> dict[str, bool]:
        return {"oneDNN": False, "bf16": True}

    def macs(self, sizes: list[int]) -> dict[str, Any]:
        at = {str(px): {"convolution": 10**9 * px, "linear": 10**9 * px, "attention": 0} for px in sizes}
        unet = {"sizes": at, "blocks": {"input_blocks.0": 1.0}, "shallow": 0.04}
        return {"unets": {"KOALA-700M": unet, "SDXL": unet}, "vae": at}

    def load(self, what: str, folder: str) -> dict[str, Any]:
        bytes_ = {"ram": 2 * GB, "gpu": 2 * GB}
        return {"seconds": self.seconds(), "peak": bytes_, "above": bytes_, "weights": 2 * GB}

    def step(self, out: str = "", routines: str = "", **_: Any) -> dict[str, Any]:
        if out:
            numpy.save(out, numpy.array([2.0, 1.0 if self.engine == "stock" else 1.5]))
        return {"seconds": self.seconds() / (2 if routines else 1), "peak": {"ram": 3 * GB, "gpu": GB}}

    decode = step

    def types(self) -> dict[str, str]:
        return {"unet": "float32", "vae": "float32"}

    def load_models(self, folder: str) -> dict[str, Any]:
        return {}

    def sample(self, way: str, **_: Any) -> dict[str, Any]:
        reused = way.startswith(("balanced", "fast"))
        return {"seconds": 1.0 if reused else 2.0, "said": "12 of 25" if reused else ""}

    def load_prompts(self, prompts: int) -> dict[str, float]:
        return {"shallow": 0.04}

    def quality(self, patch: str, value: Any, run: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
        cost = run["steps"] / reference["steps"]
        if patch:
            cost = 0.5 if patch != OURS or value.startswith(("balanced", "fast")) else 1.0
        psnr = 100.0 if cost == 1 else 40.0 if patch == OURS else 60 * cost
        return {"cost": cost, "psnr": psnr, "fidelity": 90.0, "deep": 1.0, "shallow": 1.0}

    def seconds(self) -> float:
        return {"pack": 1.0, "stock": 2.0}.get(self.engine, 4.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    """Sections that measure nothing."""
    FakeWorker.asked, FakeWorker.most_open, FakeWorker.open = [], 0, Counter()
    for module in (sections, command):
        monkeypatch.setattr(module, "Worker", FakeWorker)
    monkeypatch.setattr(published, "link", lambda target: target)
    return FakeWorker


@pytest.fixture(scope="module")
def survey() -> dict[str, Any]:
    """A real quality survey, in a worker."""
    return SECTIONS["quality"](Bench(survey=SMALL))


def test_figures_of_measurements() -> None:
    assert spread([3, 1, 2]) == Spread(2, 1, 3)
    assert ratio([1, 4], [2, 2]) == Spread(1.25, 0.5, 2)
    with pytest.raises(ValueError, match="no measurement"):
        spread([])
    with pytest.raises(ValueError, match="zip"):
        ratio([1, 2], [1])


@pytest.mark.parametrize(("cost", "value"), [(0.1, 10), (0.2, 10), (0.3, 15), (0.4, 20), (0.5, 25), (0.9, 30)])
def test_a_curve_is_read_between_its_points_and_keeps_its_ends(cost: float, value: float) -> None:
    points = [(0.6, 30), (0.2, 10), (0.4, 12), (0.4, 20)]  # unsorted, and two at one cost: the better counts
    assert at_cost(points, cost) == pytest.approx(value)


def test_fewer_steps_lie_around_a_cost() -> None:
    assert bracket(25, 0.5) == (12, 13)
    assert bracket(10, 0.5) == (5,)
    assert bracket(10, 0.01) == (1, 2)
    assert bracket(10, 1.0) == (10,)


def test_a_bound_is_met_from_its_side() -> None:
    assert is_met(0.6, 0.6, at_most=True)
    assert not is_met(0.61, 0.6, at_most=True)
    assert is_met(2, 1.9, at_most=False)
    assert not is_met(1.8, 1.9, at_most=False)


def test_a_bound_within_the_spread_is_undecided() -> None:
    assert is_met(Spread(0.5, 0.4, 0.6), 0.6, at_most=True) is True
    assert is_met(Spread(0.5, 0.4, 0.7), 0.6, at_most=True) is None
    assert is_met(Spread(0.7, 0.5, 0.8), 0.6, at_most=True) is None
    assert is_met(Spread(0.7, 0.65, 0.8), 0.6, at_most=True) is False
    assert is_met(Spread(2, 1.8, 2.2), 1.9, at_most=False) is None
    assert is_met(Spread(2, 1.9, 2.2), 1.9, at_most=False) is True
    assert with_spread(Spread(2, 1.8, 2.25), "x") == "2 x (1.8..2.25)"
    assert with_spread(0.12345, "GB") == "0.123 GB"


def test_how_sure_the_median_of_many_is() -> None:
    assert sure([3, 1, 2]) == Spread(2, 1, 3)
    assert sure(range(6)) == Spread(2.5, 0, 5)  # all but 2 of 64 orders of six
    assert sure([*range(-10, 11)]) == Spread(0, -5, 5)  # a table of order statistics: the 6th and the 16th of 21
    with pytest.raises(ValueError, match="no measurement"):
        sure([])


def test_a_psnr_of_the_same_image_is_no_figure() -> None:
    assert decibels(100.0) == "identical"
    assert decibels(46.24) == "46.2"


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_sections_make_a_report_that_judges_every_target(
    fake: type[FakeWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(command, "require_gpu", lambda: None)
    text = command.run(command.chosen([], device), Bench(device, 2, SMALL), tmp_path).read_text("utf-8")
    (measured,), shared = store.read(tmp_path).values(), store.shared(tmp_path)
    found = {**shared, **measured}
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
    assert len(plots) == (3 if device == "cpu" else 2)
    for plot in plots:
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
        assert f"({plot})" in text


TITLES = {
    "cpu": ["Loading", "A step", "VAE decode", "Sampling", "Memory", "What limits the speed"],
    "cuda": ["Loading", "A step", "VAE decode", "Sampling", "Memory", "What limits the speed"],
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


def test_what_seems_faster_than_its_bound_is_undecided(fake: type[FakeWorker]) -> None:
    machine = FakeWorker(NO_ENGINE, "cpu").machine()
    found = {name: {"machine": machine, "figures": SECTIONS[name](Bench())} for name in ("machine", "macs")}
    for name in ("step", "decode"):
        found[name] = {"machine": machine, "figures": SECTIONS[name](Bench(repeats=1))}
    assert readings.bound(found, "KOALA-700M", 512) == pytest.approx(2 * 2 * 2 * 512 / 100)  # at 100 GFLOP/s
    rows = [line for line in bounds(found, "ram") if line.startswith("| a guided step, 512 px")]
    assert rows
    assert all("undecided" in row for row in rows)  # half a second, where 41 are the least
    for runs in found["step"]["figures"]["sizes"]["512"].values():
        runs[0]["seconds"] = 100.0
    rows = [line for line in bounds(found, "ram") if line.startswith("| a guided step, 512 px | pack, exact")]
    assert rows[0].endswith("| 41.0 % |")


def test_part_of_the_sections_makes_a_report(fake: type[FakeWorker], tmp_path: Path) -> None:
    text = command.run(["macs"], Bench(), tmp_path).read_text("utf-8")
    assert "### Multiplications" in text
    assert "### Loading" not in text
    assert "Not measured" in text
    assert not list(tmp_path.glob("*.png"))


def test_engines_take_turns_and_no_more_than_three_are_there_at_once(fake: type[FakeWorker]) -> None:
    figures = SECTIONS["step"](Bench(repeats=2))
    assert fake.most_open == 3
    assert fake.open.total() == 0
    asked = [
        (engine, given["routines"]) for engine, task, given in fake.asked if task == "step" and given["px"] == SIZES[0]
    ]
    turn = [("pack", "exact"), ("pack", "bf16"), ("stock", ""), ("diffusers", "")]
    assert asked[:12] == 3 * turn  # the first turn does not count
    assert set(figures["sizes"]["256"]) == {*ROUTINES, "stock", "diffusers"}
    assert all(len(runs) == 2 for at in figures["sizes"].values() for runs in at.values())
    assert figures["difference"]["stock"] == 0
    assert figures["difference"]["pack, exact"] == 0.25  # half a unit, over the largest value


def test_other_runs_judge_reuse_alone(fake: type[FakeWorker]) -> None:
    rows = SECTIONS["quality"](Bench(survey=SMALL))["rows"]
    judged: dict[str, list[str]] = {}
    for row in rows:
        if row["family"] == OURS:
            judged.setdefault(row["run"], []).append(row["value"])
    assert judged == {str(Run()): list(VARIANTS), str(SMALL.others[0]): list(REUSE_ALONE)}


def test_a_worker_that_fails_tells_its_last_words_and_is_gone() -> None:
    with pytest.raises(UserError, match="diffusers failed at load") as caught, Worker("diffusers", "cpu") as worker:
        worker.ask("load", what="paint", folder="")
    assert "exit status 1" in str(caught.value)
    assert str(caught.value).endswith("KeyError: 'paint'\n")
    require_gone(worker)


def test_a_worker_that_is_killed_is_told_so_and_is_gone() -> None:
    with Worker("diffusers", "cpu") as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="for want of memory"):
            worker.ask("peak")
    require_gone(worker)


def test_a_worker_ends_with_an_error_around_it() -> None:
    with contextlib.suppress(KeyboardInterrupt), Worker("diffusers", "cpu") as worker:
        raise KeyboardInterrupt
    require_gone(worker)


def require_gone(worker: Worker) -> None:
    """Neither running nor a zombie."""
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA GPU"):
        command.main(["machine", "--device", "cuda"])
    assert not fake.asked


@pytest.mark.parametrize(
    ("arguments", "said"), [(["paint"], "paint"), (["load", "--repeats", "0"], "--repeats"), (["search"], "--full")]
)
def test_a_wrong_command_line_is_refused(
    capsys: pytest.CaptureFixture[str], fake: type[FakeWorker], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not fake.asked


def test_sections_are_chosen_by_device_and_name() -> None:
    assert tuple(SECTIONS) == commands.SECTIONS
    assert command.chosen([], "cpu") == list(SECTIONS)
    assert command.chosen([], "cuda") == [name for name in SECTIONS if name != "quality"]
    assert command.chosen(["step", "report"], "cpu") == ["step"]
    assert command.chosen(["report"], "cpu") == []


@pytest.mark.parametrize("full", [9, 12, 18, 25])
def test_a_search_begins_with_a_table_that_the_pack_keeps_to(full: int) -> None:
    table = search.start(full, SIGMAS)
    assert len(table) == full
    assert table[:WARMUP_STEPS] == tuple(range(WARMUP_STEPS))
    assert search.is_exact(table, SIGMAS)


def test_a_search_begins_with_a_known_table() -> None:
    known = [SIGMAS[step] for step in (0, 1, 2, 3, 5, 8, 13, 20)]
    full = sorted(full_steps(SIGMAS, known))
    assert search.start(len(full), SIGMAS, [known]) == tuple(full)


@pytest.mark.parametrize("full", [2, 26])
def test_a_search_for_a_table_that_cannot_be_is_refused(full: int) -> None:
    with pytest.raises(UserError, match="expected"):
        search.run(full, "euler")


def test_a_search_climbs_by_single_steps_to_where_no_move_is_better() -> None:
    def score(table: search.Table) -> float:
        return -float(sum(abs(step - 2 * i) for i, step in enumerate(table)))

    first = search.start(12, SIGMAS)
    found = list(search.better(first, SIGMAS, score))
    assert found[0] == (first, score(first))
    assert len(found) > 1
    assert [top for _, top in found] == sorted(top for _, top in found)
    for (before, _), (after, _) in pairwise(found):
        assert len(set(before) - set(after)) == 1
        assert search.is_exact(after, SIGMAS)


@pytest.mark.slow
def test_multiplications_are_counted_by_block() -> None:
    with Worker(NO_ENGINE, "cpu") as worker:
        found = worker.ask("macs", sizes=[256])["unets"]
    assert found["KOALA-700M"]["sizes"]["256"] != found["SDXL"]["sizes"]["256"]
    blocks = found["KOALA-700M"]["blocks"]
    assert list(blocks) == [f"{kind}_blocks.{i}" for kind in ("input", "output") for i in range(6)]
    assert 0.9 < sum(blocks.values()) <= 1
    assert found["KOALA-700M"]["shallow"] == pytest.approx(0.04, abs=0.005)
    assert "middle_block" in found["SDXL"]["blocks"]


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
    assert full == {"balanced, fp32": 12, "fast, fp32": 9}
    for name in REUSE_ALONE:
        row = readings.preset(found, name)
        assert row["shallow"] == 2 * 25  # every step runs the last layers
        assert row["cost"] == pytest.approx((row["deep"] * (1 - survey["shallow"]) + 50 * survey["shallow"]) / 50)
    for family in (FEWER, *RIVALS):
        assert all(0.1 < row["cost"] < 1 for row in readings.rows(found, family))
        assert all(5 < row["psnr"] < 60 for row in readings.rows(found, family))
    assert readings.runs_surveyed(found) == [str(Run()), str(SMALL.others[0])]


@pytest.mark.slow
def test_a_real_survey_makes_a_report(survey: dict[str, Any], tmp_path: Path) -> None:
    machine = FakeWorker(NO_ENGINE, "cpu").machine()
    store.add(tmp_path, "cpu", "quality", machine, json.loads(json.dumps(survey)))
    text = report.write(tmp_path).read_text("utf-8")
    assert "2 prompts" in text
    assert "Out of date" not in text
    store.add(tmp_path, "cpu", "quality", machine, survey | {"model": "another"})
    assert "Out of date" in report.write(tmp_path).read_text("utf-8")
    assert f"| {SMALL.others[0]} |" in text
    assert (tmp_path / "benchmarks-quality.png").stat().st_size > 5000


@pytest.fixture(autouse=True)
def _docs_are_left_alone() -> Iterator[None]:
    docs = command.ROOT / "docs"
    before = {file: file.stat().st_mtime_ns for file in docs.glob("benchmarks*")}
    yield
    assert {file: file.stat().st_mtime_ns for file in docs.glob("benchmarks*")} == before
