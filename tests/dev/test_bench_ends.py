"""The benchmark when something fails or the time is over: what was measured is kept, what was not is named."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.dev import bench_fakes
from tests.dev.bench_fakes import FakeHog, FakeServed, FakeWorker
from tools.harness.errors import UserError
from tools.measure.bench import __main__ as command
from tools.measure.bench import graphs, hog, report, served, store
from tools.measure.bench.asked import Bench, Scale
from tools.measure.bench.graphs import Image
from tools.measure.bench.process import NO_ENGINE, after, end_all
from tools.measure.bench.sections import SECTIONS

fake = pytest.fixture(bench_fakes.fake)
docs_are_left_alone = pytest.fixture(autouse=True)(bench_fakes.docs_are_left_alone)


@pytest.fixture
def dies_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The server ends at that prompt, counted from 0, and answers none after it."""
    at = [0]
    answered: list[str] = []
    plain = FakeServed.draw

    def draw(self: FakeServed, way: str, image: Image) -> dict[str, Any]:
        if len(answered) >= at[0]:
            raise ConnectionError("http://127.0.0.1: the server closed the connection while a graph ran")
        answered.append(way)
        return plain(self, way, image)

    monkeypatch.setattr(FakeServed, "draw", draw)
    return at


def page(folder: Path, section: str, found: dict[str, Any]) -> str:
    """The page of one section's figures."""
    store.add(folder, "cuda", section, FakeWorker(NO_ENGINE, "cuda").machine(), found)
    return report.write(folder).read_text("utf-8")


def test_a_server_that_ends_leaves_what_was_measured(
    fake: type[FakeWorker], dies_at: list[int], tmp_path: Path
) -> None:
    dies_at[0] = 5
    found = SECTIONS["server"](Bench("cuda", 1))
    assert {way: len(runs) for way, runs in found["graphs"].items()} == {"stock": 2, "pack": 2, "pack, exact": 1}
    assert found["left out"] == ["pack, balanced", "pack, fast", "stock, compiled"]
    text = page(tmp_path, "server", found)
    assert "*server* ended early at pack, exact: http://127.0.0.1: the server closed the connection" in text
    assert "Not reached in *server*: pack, balanced, pack, fast, stock, compiled." in text
    assert "| pack, exact | 1.50 |  | 4.00 |" in text


def test_a_section_that_ended_early_is_told_at_the_end(
    fake: type[FakeWorker], dies_at: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "require_gpu", lambda: None)
    dies_at[0] = 1
    with pytest.raises(UserError, match="server, in part: at stock: http"):
        command.run(["server"], Bench("cuda", 1), tmp_path)
    assert [list(sections) for sections in store.read(tmp_path).values()] == [["server"]]


def test_where_nothing_was_measured_the_section_has_failed(fake: type[FakeWorker], dies_at: list[int]) -> None:
    for name in ("server", "fit"):
        with pytest.raises(ConnectionError):
            SECTIONS[name](Bench("cuda", 1))


def test_a_server_that_the_limit_ends_has_not_failed(fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1000.0]
    plain = FakeServed.draw

    def draw(self: FakeServed, way: str, image: Image) -> dict[str, Any]:
        if way == "pack":
            left[0] = -1.0
            raise UserError("ComfyUI ended while it was at work (exit status -9)")
        return plain(self, way, image)

    monkeypatch.setattr(FakeServed, "draw", draw)
    monkeypatch.setattr(Bench, "left", lambda _: left[0])
    found = SECTIONS["server"](Bench("cuda", 1))
    assert (list(found["graphs"]), found["dropped"], found["left out"][0]) == (["stock"], ["pack"], "pack, exact")
    assert "ended early" not in found


def test_what_needs_no_server_is_measured_without_it(
    fake: type[FakeWorker], dies_at: list[int], tmp_path: Path
) -> None:
    dies_at[0] = 4
    found = SECTIONS["fit"](Bench("cuda"))
    assert list(found["free"]["8"]) == [
        "KOALA-700M, stock",
        "KOALA-700M, exact",
        "KOALA-700M, diffusers, offload",
        "SDXL, stock",
    ]
    assert all("SDXL, stock" in ways for ways in found["free"].values())
    assert found["left out"][:2] == ["KOALA-1B, stock in 8 GB", "KOALA-1B, exact in 8 GB"]
    assert len(found["left out"]) == 6 * len(Scale().fitted) - 2
    text = page(tmp_path, "fit", found)
    assert "*fit* ended early at KOALA-1B, stock in 8 GB: http" in text
    assert "| KOALA-700M, exact | not tried | 1.5 s |" in text


def test_a_round_for_which_no_time_is_left_is_dropped_after_all_of_the_first(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [1000.0]
    plain = FakeHog.leave

    def leave(self: FakeHog, gigabytes: float) -> int:
        if gigabytes == 12:
            left[0] = 5.0
        return plain(self, gigabytes)

    monkeypatch.setattr(FakeHog, "leave", leave)
    monkeypatch.setattr(Bench, "left", lambda _: left[0])
    found = SECTIONS["fit"](Bench("cuda"))
    assert {free for free, ways in found["free"].items() if "SDXL, stock" in ways} == {"8", "4", "3"}
    assert "KOALA-700M, stock in 12 GB" in found["dropped"]
    assert found["left out"] == []
    left[0] = 1000.0
    monkeypatch.setattr(
        FakeHog, "leave", lambda self, gigabytes: left.__setitem__(0, 1000.0 if gigabytes > 3 else 30.0)
    )
    found = SECTIONS["fit"](Bench("cuda"))
    assert found["dropped"][-3:] == ["12 GB", "6 GB", "2 GB"]
    assert found["left out"] == []


def test_memory_that_cannot_be_left_costs_that_level_alone(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = FakeHog.leave

    def leave(self: FakeHog, gigabytes: float) -> int:
        if gigabytes == 4:
            raise UserError("bench fit: the GPU's memory could not be taken but for 4 GB")
        return plain(self, gigabytes)

    monkeypatch.setattr(FakeHog, "leave", leave)
    found = SECTIONS["fit"](Bench("cuda"))
    assert (found["free"]["4"], list(found["left"])) == ({}, ["8", "3", "12", "6", "2"])
    assert "KOALA-1B, exact" in found["free"]["6"]
    assert found["left out"] == []
    assert "4 GB: bench fit: the GPU's memory could not be taken but for 4 GB" in page(tmp_path, "fit", found)


def test_a_process_that_holds_memory_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is no GPU, so that it ends at once."""
    with hog.Hog("cuda") as held:
        for _ in range(2):
            with pytest.raises(UserError, match="could not be taken but for 4 GB"):
                held.leave(4)


def test_decoding_keeps_the_turns_before_a_failure(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    plain = FakeWorker.decode

    def decode(self: FakeWorker, px: int, **given: Any) -> dict[str, Any]:
        asked.append(px)
        if asked.count(1024) == 11:  # of four engines the third's third run, of which the first does not count
            raise UserError("bench: stock failed at decode\nout of memory")
        return plain(self, px=px, **given)

    monkeypatch.setattr(FakeWorker, "decode", decode)
    found = SECTIONS["decode"](Bench("cuda", 3))
    assert {px: {len(runs) for runs in ways.values()} for px, ways in found["sizes"].items()} == {
        "512": {3},
        "1024": {1},
    }
    assert "*decode* ended early at 1024 px: bench: stock failed" in page(tmp_path, "decode", found)


def test_what_a_gpu_does_at_first_does_not_count(fake: type[FakeWorker]) -> None:
    for device, runs in (("cpu", 2), ("cuda", 3)):
        fake.asked.clear()
        SECTIONS["decode"](Bench(device, 2))
        large = [engine for engine, task, given in fake.asked if task == "decode" and given["px"] == 1024]
        assert large.count("stock") == runs


def test_something_is_ended_after_its_time_and_not_after_it_is_done() -> None:
    ended = threading.Event()
    with after(0.05, ended.set):
        assert ended.wait(10)
    ended.clear()
    with after(0.2, ended.set):
        pass
    assert not ended.wait(0.5)


@pytest.mark.slow
def test_when_the_time_is_over_the_server_ends_and_who_waits_is_told() -> None:
    until, ended = time.monotonic() + 100, [0.0]

    def draw() -> None:
        with served.serving((graphs.BUILT_IN,), lambda: until - time.monotonic()) as running:
            assert 0 < running.client.timeout < 100
            ended[0] = time.monotonic() + 3
            with after(3, end_all):
                running.draw(graphs.PACK, Image(graphs.BUILT_IN, 1024, batch=4, steps=1000))

    with pytest.raises(UserError, match="ComfyUI ended while it was at work"):
        draw()
    assert 0 < time.monotonic() - ended[0] < 20
