"""The benchmark's sections on what people run on a GPU, as far as a CPU can show them."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.dev import bench_fakes
from tests.dev.bench_fakes import FakeWorker
from tools.harness import testhost
from tools.harness.errors import UserError
from tools.measure.bench import __main__ as command
from tools.measure.bench import (
    gpu_images,
    graphs,
    hog,
    nvml,
    readings,
    report,
    served,
    store,
)
from tools.measure.bench.asked import Bench, Dropped, Scale
from tools.measure.bench.graphs import Image
from tools.measure.bench.process import NO_ENGINE
from tools.measure.bench.sections import SECTIONS
from tools.measure.bench.stats import Spread

fake = pytest.fixture(bench_fakes.fake)
docs_are_left_alone = pytest.fixture(autouse=True)(bench_fakes.docs_are_left_alone)


def test_what_time_does_not_allow_is_dropped_and_named(
    fake: type[FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none_left = Bench("cuda", 1, until=time.monotonic() + 5)
    found = SECTIONS["server"](none_left)
    assert found["graphs"] == {}
    assert found["dropped"] == list(Scale().ways)
    assert command.run([], none_left, tmp_path).is_file()
    store.add(tmp_path, "cuda", "server", FakeWorker(NO_ENGINE, "cuda").machine(), found)
    assert "Dropped from *server* for want of time: stock, pack," in report.write(tmp_path).read_text("utf-8")
    capsys.readouterr()
    command.run(["macs"], Bench("cpu", until=time.monotonic() - 1), tmp_path)
    assert "dropped for want of time: macs" in capsys.readouterr().out
    assert not store.shared(tmp_path)


def test_steps_of_larger_sizes_are_dropped_first(
    fake: type[FakeWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they will take is reckoned from the smallest size, here 20 seconds of 100."""
    monkeypatch.setattr(Bench, "left", lambda _: 100.0)
    with monkeypatch.context() as patched:
        patched.setattr("time.monotonic", itertools.count(0.0, 20.0).__next__)
        found = SECTIONS["step"](Bench("cpu", 2))
    assert found["dropped"] == ["768 px, batch 1", "1024 px, batch 1"]
    assert (list(found["sizes"]), list(found["batches"]), list(found["sdxl"])) == (
        ["256", "512"],
        ["1", "2", "4"],
        ["256", "512"],
    )
    store.add(tmp_path, "cpu", "step", FakeWorker("stock", "cpu").machine(), found)
    text = report.write(tmp_path).read_text("utf-8")
    assert "Dropped from *step* for want of time: 768 px, batch 1, 1024 px, batch 1." in text
    assert "a step at 512 px, pack, exact: time over stock" in text
    assert "a step at 1024 px" not in text
    assert "![size]" not in text
    assert "![batch]" in text


def test_a_page_of_the_smallest_size_alone(
    fake: type[FakeWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "left", lambda _: 30.0)
    with monkeypatch.context() as patched:
        patched.setattr("time.monotonic", itertools.count(0.0, 20.0).__next__)
        found = SECTIONS["step"](Bench("cpu", 2))
    assert (list(found["sizes"]), list(found["batches"]), found["sdxl"]) == (["256"], ["1"], {})
    for name in ("machine", "macs", "decode"):
        store.add(tmp_path, "cpu", name, FakeWorker("stock", "cpu").machine(), SECTIONS[name](Bench()))
    store.add(tmp_path, "cpu", "step", FakeWorker("stock", "cpu").machine(), found)
    text = report.write(tmp_path).read_text("utf-8")
    assert "| 256 | pack, exact |" in text
    assert "a guided step, 256 px" in text
    assert "a guided step, 512 px" not in text


def test_each_thing_is_dropped_once(capsys: pytest.CaptureFixture[str]) -> None:
    dropped = Dropped()
    assert not dropped.lacks(Bench(), 1e9, "without a limit nothing is")
    for _ in range(2):
        assert dropped.lacks(Bench(until=time.monotonic() + 5), 10, "a run")
    assert not dropped.lacks(Bench(until=time.monotonic() + 60), 10, "another")
    assert dropped == ["a run"]
    assert capsys.readouterr().out.count("a run") == 1


def test_what_failed_in_some_memory_is_not_tried_in_less(fake: type[FakeWorker], tmp_path: Path) -> None:
    found = SECTIONS["fit"](Bench("cuda"))
    row = {free: ways.get("KOALA-700M, exact") for free, ways in found["free"].items()}
    assert [free for free, made in row.items() if made and "seconds" in made] == ["8", "4", "12", "6"]
    assert row["3"] == {"error": "CUDA out of memory", "fits": False}
    assert row["2"] is None
    assert all("KOALA-700M, fp8, exact" in ways for ways in found["free"].values())
    assert found["left out"] == []
    store.add(tmp_path, "cuda", "fit", FakeWorker(NO_ENGINE, "cuda").machine(), found)
    (line,) = [
        line
        for line in report.write(tmp_path).read_text("utf-8").splitlines()
        if line.startswith("| KOALA-700M, exact |")
    ]
    assert line == "| KOALA-700M, exact | 1.5 s | 1.5 s | 1.5 s | 1.5 s | does not fit | not tried |"


def test_compilation_is_told_apart(fake: type[FakeWorker]) -> None:
    figures = SECTIONS["images"](Bench("cuda", 2))
    found = {"images": {"machine": {}, "figures": figures}}
    assert readings.compilation(found, "1024 px", "exact") == 10  # the first run takes so much longer
    assert readings.warm(found, "1024 px", "exact") == 0
    assert readings.image_speed_up(found, "512 px", "balanced", "stock") == Spread(2, 2, 2)
    assert readings.apart(found, "1024 px", "exact") == pytest.approx(20 * numpy.log10(1 / (0.01 / 2**0.5)))
    assert readings.more_memory(found, "exact") == 1
    assert readings.faster_than_rival(found, "exact", "stock, compiled") == Spread(1, 1, 1)
    with pytest.raises(readings.NotMeasured):
        readings.apart(found, "256 px", "exact")


def test_a_way_that_fails_is_named_and_the_rest_is_measured(
    fake: type[FakeWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(self: FakeWorker, way: str, **given: Any) -> dict[str, Any]:
        if way == "stock, compiled":
            raise UserError("bench: no engine failed\nno C++ compiler")
        return plain(self, way, **given)

    plain = FakeWorker.sample
    monkeypatch.setattr(FakeWorker, "sample", sample)
    found = SECTIONS["images"](Bench("cuda", 1))
    assert list(found["failed"]) == ["stock, compiled"]
    assert found["rivals"]["stock, compiled"] == {}
    assert set(found["rivals"]["diffusers, fast"]) == {"diffusers, fast", "exact"}
    assert all(set(ways) == set(Scale().sampled) for ways in found["places"].values())
    assert set(found["alone"]) == {"exact", "KOALA Sampler", "stock"}
    store.add(tmp_path, "cuda", "images", FakeWorker("stock", "cuda").machine(), found)
    assert "TorchCompileModel failed (stock, compiled at 1024 px): no C++ compiler" in report.write(tmp_path).read_text(
        "utf-8"
    )


def test_what_shares_a_process_with_a_way_that_fails_goes_on_in_a_new_one(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before is kept; a first run in the new process does not count as a later one."""
    drawn: list[tuple[FakeWorker, str]] = []

    def sample(self: FakeWorker, way: str, px: int, **given: Any) -> dict[str, Any]:
        if way == "exact" and px == 512:
            raise UserError("bench: no engine failed (killed, for want of memory or time)")
        is_new = (self, way) not in drawn
        drawn.append((self, way))
        made = plain(self, way, **given)
        return {**made, "seconds": 1000.0} if is_new else made

    plain = FakeWorker.sample
    monkeypatch.setattr(FakeWorker, "sample", sample)
    found = SECTIONS["images"](Bench("cuda", 1))
    assert set(found["failed"]) == {"exact"}
    assert found["failed"]["exact"]["at"] == "exact at 512 px"
    assert found["places"]["1024 px"]["exact"]["again"] == [2.0]
    assert set(found["places"]["512 px"]) == {"stock", "KOALA Sampler", "balanced", "fast", "diffusers"}
    assert found["places"]["512 px"]["stock"]["again"] == [2.0]
    assert found["rivals"]["diffusers, fast"]["exact"]["again"] == []


def test_what_compiles_for_minutes_comes_last_and_in_turns_with_exact(fake: type[FakeWorker]) -> None:
    found = SECTIONS["images"](Bench("cuda", 2))
    tasks = [
        (given.get("way", engine), given["px"], given["batch"])
        for engine, task, given in fake.asked
        if task in ("sample", "step")
    ]
    turn = ["stock", "KOALA Sampler", "exact", "balanced", "fast", "diffusers"]
    sizes = [(1024, 1), (512, 1), (1024, 4)]
    assert tasks[:54] == [(way, *size) for size in sizes for _ in range(3) for way in turn]
    alone = ["exact", "exact", "KOALA Sampler", "KOALA Sampler", "stock", "stock"]
    rivals = [way for rival in ("stock, compiled", "diffusers, fast") for way in (rival, *[rival, "exact"] * 2)]
    assert tasks[54:] == [(way, 1024, 1) for way in (*alone, *rivals)]
    loaded = [given["loaders"] for _, task, given in fake.asked if task == "load_models"]
    assert loaded == [["pack", "stock"], ["pack"], ["pack"], ["stock"], ["stock"]]
    assert found["dropped"] == []


class Compiling(FakeWorker):
    """diffusers' fast settings take for ever from a run on; whoever waits is told when the process is killed."""

    endless_from = 0

    def __init__(self, engine: str, device: str, environment: dict[str, str] | None = None) -> None:
        super().__init__(engine, device, environment)
        self._killed, self._runs = threading.Event(), itertools.count()

    def kill(self) -> None:
        self._killed.set()

    def step(self, out: str = "", routines: str = "", **given: Any) -> dict[str, Any]:
        if self.engine == "diffusers, fast" and next(self._runs) >= self.endless_from:
            assert self._killed.wait(30)
            raise UserError("bench: diffusers, fast failed (killed, for want of memory or time)")
        return super().step(out, routines, **given)


@pytest.mark.parametrize("runs", [0, 2])
def test_a_rival_has_a_limit_of_its_own(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: int
) -> None:
    monkeypatch.setattr(Compiling, "endless_from", runs)
    monkeypatch.setattr(gpu_images, "Worker", Compiling)
    monkeypatch.setitem(gpu_images.LIMITS, "diffusers, fast", 0.3)
    found = SECTIONS["images"](Bench("cuda", 2))
    assert found["failed"] == {}
    at = "diffusers, fast at 1024 px" + (", in turn with diffusers, fast" if runs else "")
    assert found["dropped"] == [at]
    assert found["rivals"]["stock, compiled"]["exact"]["again"] == [2.0, 2.0]
    if runs:
        assert found["rivals"]["diffusers, fast"]["diffusers, fast"]["again"] == [100.0]
        assert readings.faster_than_rival({"images": {"figures": found}}, "exact", "diffusers, fast").median == 50
    else:
        assert found["rivals"]["diffusers, fast"] == {}
    store.add(tmp_path, "cuda", "images", FakeWorker("stock", "cuda").machine(), found)
    assert f"Dropped from *images* for want of time: {at}." in report.write(tmp_path).read_text("utf-8")


def test_at_the_limit_images_keep_what_was_measured(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All workers are ended while exact draws 512 px: that has not failed, it is dropped."""
    left = [1000.0]

    def sample(self: FakeWorker, way: str, px: int, **given: Any) -> dict[str, Any]:
        if way == "exact" and px == 512:
            left[0] = -1.0
            raise UserError("bench: no engine failed (killed, for want of memory or time)")
        return plain(self, way, **given)

    plain = FakeWorker.sample
    monkeypatch.setattr(FakeWorker, "sample", sample)
    monkeypatch.setattr(Bench, "left", lambda _: left[0])
    found = SECTIONS["images"](Bench("cuda", 1))
    assert found["failed"] == {}
    assert found["places"]["1024 px"]["exact"]["again"] == [2.0]
    assert set(found["places"]["512 px"]) == {"stock", "KOALA Sampler"}
    for what in (
        "exact at 512 px",
        "fast at 1024 px, batch 4",
        "exact at 1024 px, alone",
        "diffusers, fast at 1024 px",
    ):
        assert what in found["dropped"]
    store.add(tmp_path, "cuda", "images", FakeWorker("stock", "cuda").machine(), found)
    text = report.write(tmp_path).read_text("utf-8")
    assert "| KSampler, stock loader | not measured |" in text
    assert "exact, 25 steps at 1024 px: speed over stock KSampler" in text
    assert "exact, 25 steps at 512 px: speed over stock KSampler" not in text


def test_a_section_that_fails_leaves_the_others(
    fake: type[FakeWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def macs(_: FakeWorker, **__: Any) -> Any:
        raise UserError("bench: no engine failed at macs")

    monkeypatch.setattr(FakeWorker, "macs", macs)
    with pytest.raises(UserError, match="not measured, as they failed: macs: bench: no engine failed at macs"):
        command.run(["macs", "load"], Bench(repeats=1), tmp_path)
    assert [*store.shared(tmp_path)] == []
    assert [list(found) for found in store.read(tmp_path).values()] == [["load"]]


def test_memory_that_the_driver_does_not_tell_is_none_with_a_reason() -> None:
    with nvml.Watch(os.getpid()) as watch:
        pass
    assert (watch.peak is None) == bool(nvml.why_not(os.getpid()))
    if watch.peak is None:
        assert any(words in nvml.why_not(os.getpid()) for words in ("nvidia-ml-py", "driver"))


def test_without_a_gpu_a_hog_holds_nothing() -> None:
    with hog.Hog("cpu") as held:
        assert held.leave(4) is None


def test_every_way_to_an_image_samples_the_same() -> None:
    image = Image(px=512, steps=7, batch=2)
    for way in graphs.WAYS:
        made = graphs.graph(way, image, 11)
        sampled = {name.removeprefix("preset."): value for name, value in made["sampled"]["inputs"].items()}
        assert (sampled["seed"], sampled["steps"], sampled["cfg"], sampled["sampler_name"]) == (11, 7, 7.5, "euler")
        assert made["empty"]["inputs"] == {"width": 512, "height": 512, "batch_size": 2}
        for node in made.values():
            for value in node["inputs"].values():
                assert not isinstance(value, list) or value[0] in made
    assert made["model" if "model" in made else "loaded"]


def test_ones_own_comfyui_is_measured_in_workers_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(testhost.OWN, "")
    tested = testhost.test_host()
    own = tmp_path / "own"
    own.symlink_to(tested.folder, target_is_directory=True)
    testhost.use(own)
    assert testhost.test_host().folder == tested.folder.resolve()
    assert testhost.test_host().borrowed
    with pytest.raises(UserError, match="no ComfyUI here"):
        testhost.use(tmp_path)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_real_server_draws_and_tells_its_seconds(tmp_path: Path) -> None:
    bench = Bench(repeats=1)
    figures = {name: SECTIONS[name](bench) for name in ("server", "fit")}
    assert set(figures["server"]["graphs"]) == set(bench.scale.ways)
    for runs in figures["server"]["graphs"].values():
        assert len(runs) == 2
        assert all(0 < run["seconds"] < 600 for run in runs)
    assert figures["fit"]["left"] == {"8": None, "4": None}
    assert all(made["seconds"] > 0 for ways in figures["fit"]["free"].values() for made in ways.values())
    for name, found in figures.items():
        store.add(tmp_path, "cpu", name, FakeWorker(NO_ENGINE, "cpu").machine(), json.loads(json.dumps(found)))
    text = report.write(tmp_path).read_text("utf-8")
    assert "### The real server" in text
    assert "| koala-tiny, pack |" in text


@pytest.mark.slow
def test_a_graph_that_the_server_cannot_run_is_told_as_it_says() -> None:
    with served.serving((graphs.BUILT_IN,)) as running:
        made = running.draw(graphs.STOCK, Image(px=128, steps=1))
        assert "safetensors" in made["error"]
        assert made["fits"]
        running.forget()
        assert running.draw(graphs.PACK, Image(graphs.BUILT_IN, 128, steps=1))["seconds"] > 0
