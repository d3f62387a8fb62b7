"""The benchmark without its measurements: what it computes, and refuses."""

from __future__ import annotations

import contextlib
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from koala_sdxl.host.accelerate.plan import WARMUP_STEPS, full_steps
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.schedule import schedule
from tests.dev import bench_fakes
from tests.dev.bench_fakes import FakeWorker
from tools import commands
from tools.harness import inprocess
from tools.harness.errors import UserError
from tools.measure.bench import __main__ as command
from tools.measure.bench import peers, report, search, store
from tools.measure.bench.asked import Bench
from tools.measure.bench.formats import decibels, with_spread
from tools.measure.bench.process import NO_ENGINE, Worker, end_all
from tools.measure.bench.sections import OF_DEVICES, SECTIONS, SIZES
from tools.measure.bench.stats import Spread, at_cost, bracket, is_met, ratio, spread, sure
from tools.measure.bench.variants import ROUTINES

fake = pytest.fixture(bench_fakes.fake)
docs_are_left_alone = pytest.fixture(autouse=True)(bench_fakes.docs_are_left_alone)


SIGMAS = schedule(25, "leading").sigmas[:-1].tolist()


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


def test_a_peer_is_measured_where_it_is_installed_and_else_named(
    fake: type[FakeWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeWorker(NO_ENGINE, "cpu").machine()
    monkeypatch.setitem(peers.NEEDED, peers.OPENVINO, "no_such_package")
    store.add(tmp_path, "cpu", "step", machine, SECTIONS["step"](Bench(repeats=1)))
    text = report.write(tmp_path).read_text("utf-8")
    assert "OpenVINO: not measured, as no_such_package is not installed (tools/requirements-peers.txt)." in text
    monkeypatch.setitem(peers.NEEDED, peers.OPENVINO, "json")
    store.add(tmp_path, "cpu", "step", machine, SECTIONS["step"](Bench(repeats=1)))
    assert fake.most_open == 3  # it takes turns with the pack alone
    text = report.write(tmp_path).read_text("utf-8")
    assert "| 512 | OpenVINO | 4.00 (4.00..4.00) | 8.00 x (8.00..8.00) | 3.00 |" in text
    assert "not measured, as it computes on the CPU" in peers.why_not(peers.OPENVINO, "cuda")


def test_a_worker_that_fails_tells_its_last_words_and_is_gone() -> None:
    with pytest.raises(UserError, match="diffusers failed at load") as caught, Worker("diffusers", "cpu") as worker:
        worker.ask("load", what="paint", folder="")
    assert "exit status 1" in str(caught.value)
    assert str(caught.value).endswith("KeyError: 'paint'\n")
    require_gone(worker)


def test_when_the_time_is_over_all_workers_end() -> None:
    with Worker("diffusers", "cpu") as worker:
        end_all()
        with pytest.raises(UserError, match=r"diffusers failed at load .*\(killed, for want of memory or time\)"):
            worker.ask("load", what="unet", folder="none")


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
    assert command.chosen([], "cpu") == list(OF_DEVICES["cpu"])
    assert command.chosen([], "cuda") == list(OF_DEVICES["cuda"])
    assert set(command.chosen([], "cpu")) | set(command.chosen([], "cuda")) == set(SECTIONS)
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
    def score(table: search.Steps) -> float:
        return -float(sum(abs(step - 2 * i) for i, step in enumerate(table)))

    first = search.start(12, SIGMAS)
    found = list(search.better(first, SIGMAS, score))
    assert found[0] == (first, score(first))
    assert len(found) > 1
    assert [top for _, top in found] == sorted(top for _, top in found)
    for (before, _), (after, _) in pairwise(found):
        assert len(set(before) - set(after)) == 1
        assert search.is_exact(after, SIGMAS)


def test_a_small_unets_multiplications_are_counted_by_block() -> None:
    inprocess.activate()
    from tools.measure.bench import macs

    (found,) = macs.counted([128, 256], [KOALA_TINY])["unets"].values()
    assert list(found["blocks"]) == [f"{kind}_blocks.{i}" for kind in ("input", "output") for i in range(6)]
    assert 0.9 < sum(found["blocks"].values()) <= 1
    assert 0 < found["shallow"] < 0.2
    small, large = (sum(found["sizes"][px].values()) for px in ("128", "256"))
    assert 3 < large / small < 5  # four times the pixels


@pytest.mark.nightly
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
