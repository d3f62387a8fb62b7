"""The benchmark's sections on what people run on a GPU, as far as a CPU can show them."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.dev import bench_fakes
from tests.dev.bench_fakes import FakeHog, FakeWorker
from tools.harness import testhost
from tools.harness.errors import UserError
from tools.measure.bench import __main__ as command
from tools.measure.bench import (
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
    FakeHog.now = 24
    found = SECTIONS["fit"](Bench("cuda"))
    row = {free: ways.get("KOALA-700M, pack") for free, ways in found["free"].items()}
    assert [free for free, made in row.items() if made and "seconds" in made] == ["12", "8", "6", "4"]
    assert row["3"] == {"error": "CUDA out of memory", "fits": False}
    assert row["2"] is None
    assert all("KOALA-700M, pack, fp8" in ways for ways in found["free"].values())
    store.add(tmp_path, "cuda", "fit", FakeWorker(NO_ENGINE, "cuda").machine(), found)
    (line,) = [
        line
        for line in report.write(tmp_path).read_text("utf-8").splitlines()
        if line.startswith("| KOALA-700M, pack |")
    ]
    assert line == "| KOALA-700M, pack | 1.5 s | 1.5 s | 1.5 s | 1.5 s | does not fit | not tried |"


def test_compilation_is_told_apart(fake: type[FakeWorker]) -> None:
    figures = SECTIONS["images"](Bench("cuda", 2))
    found = {"images": {"machine": {}, "figures": figures}}
    assert readings.compilation(found, "1024 px", "exact") == 10  # the first run takes so much longer
    assert readings.warm(found, "1024 px", "exact") == 0
    assert readings.image_speed_up(found, "512 px", "balanced", "stock") == Spread(2, 2, 2)
    assert readings.apart(found, "1024 px", "exact") == pytest.approx(20 * numpy.log10(1 / (0.01 / 2**0.5)))
    assert readings.more_memory(found, "1024 px", "exact") == 1
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
    assert all("stock, compiled" not in ways for ways in found["places"].values())
    assert all(len(ways) == len(Scale().sampled) - 1 for ways in found["places"].values())
    assert set(found["warm"]) == {"exact", "diffusers, fast"}
    store.add(tmp_path, "cuda", "images", FakeWorker("stock", "cuda").machine(), found)
    assert "TorchCompileModel failed: no C++ compiler" in report.write(tmp_path).read_text("utf-8")


def test_what_shares_a_process_with_a_way_that_fails_is_not_measured(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(self: FakeWorker, way: str, **given: Any) -> dict[str, Any]:
        if way == "exact":
            raise UserError("bench: no engine failed (killed, for want of memory or time)")
        return plain(self, way, **given)

    plain = FakeWorker.sample
    monkeypatch.setattr(FakeWorker, "sample", sample)
    found = SECTIONS["images"](Bench("cuda", 1))
    assert set(found["failed"]) == {"stock", "KOALA Sampler", "exact", "balanced", "fast"}
    assert found["failed"]["fast"] == "with exact"
    assert all(set(ways) == {"stock, compiled", "diffusers", "diffusers, fast"} for ways in found["places"].values())


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
