"""Stand-ins for what the benchmark measures with: workers, the server, a process that holds memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy
import pytest

from tools.harness import testhost
from tools.measure.bench import __main__ as command
from tools.measure.bench import (
    gpu_images,
    gpu_sections,
    published,
    sections,
    served,
)
from tools.measure.bench.asked import Run, Survey
from tools.measure.bench.graphs import Image
from tools.measure.bench.sections import OURS

SMALL = Survey(2, 1, steps=(6,), thresholds=(0.2,), starts=(0.6,), others=(Run("dpmpp_2m", 12),))


GB = 10**9


class FakeWorker:
    """Answers as a worker does, at once: the pack takes half of stock's time, by its own routines a quarter."""

    open: ClassVar[Counter[str]] = Counter()
    most_open = 0
    asked: ClassVar[list[tuple[str, str, dict[str, Any]]]] = []

    def __init__(self, engine: str, device: str, environment: dict[str, str] | None = None) -> None:
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
        rates = {"contiguous": 50.0, "channels_last": 100.0, "Winograd": 150.0, "bf16": 200.0}
        shape = {"shape": "1 x 2 to 3 channels", "gflop": 4.0, **rates}
        return {"matmul": {"PyTorch": 100.0, "bf16": 300.0}, "unet": [shape], "vae": [shape], "fp16 to fp32": 5.0}

    def probes(self) -> dict[str, bool]:
        return {"oneDNN": False, "NNPACK": True, "bf16": True, "bf16 in the VAE": False}

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
        seconds = self.seconds() / (2 if routines else 1)
        return {"seconds": seconds, "processor": 2 * seconds, "peak": {"ram": 3 * GB, "gpu": GB}}

    decode = step

    def types(self) -> dict[str, str]:
        return {"unet": "float32", "vae": "float32"}

    def load_models(self, folder: str, loaders: Sequence[str] = ()) -> dict[str, Any]:
        return {}

    def kill(self) -> None:
        pass

    def sample(self, way: str, out: str = "", **_: Any) -> dict[str, Any]:
        reused = way.startswith(("balanced", "fast"))
        if out:
            numpy.save(out, numpy.array([2.0, 1.0 if way in ("stock", "KOALA Sampler") else 1.01]))
        peak = {"ram": 3 * GB, "gpu": 2 * GB if way == "exact" else GB, "nvml": None}
        first = 10.0 if out else 0.0
        return {"seconds": first + (1.0 if reused else 2.0), "peak": peak, "said": "12 of 25" if reused else ""}

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


class FakeHog(contextlib.nullcontext[None]):
    """Leaves what it is told to; in 3 GB nothing fits but fp8."""

    now: ClassVar[float] = 24

    def __init__(self, device: str) -> None:
        super().__init__()

    def __enter__(self) -> Any:
        return self

    def leave(self, gigabytes: float) -> int:
        FakeHog.now = gigabytes
        return int(gigabytes * GB)


class FakeServed:
    """Answers as the server does, at once."""

    notes: ClassVar[list[str]] = ["DynamicVRAM support detected and enabled"]

    def draw(self, way: str, image: Image) -> dict[str, Any]:
        if FakeHog.now <= 3 and image.weights == "default":
            return {"error": "CUDA out of memory", "fits": False}
        return {"seconds": 1.5, "nvml": 4 * GB, "fits": True}

    def forget(self) -> None:
        pass


def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    """A fixture's body: sections that measure nothing."""
    FakeWorker.asked, FakeWorker.most_open, FakeWorker.open, FakeHog.now = [], 0, Counter(), 24
    for module in (sections, gpu_images, gpu_sections, command):
        monkeypatch.setattr(module, "Worker", FakeWorker)
    monkeypatch.setattr(published, "link", lambda target: target)
    monkeypatch.setattr(served, "serving", lambda models, left: contextlib.nullcontext(FakeServed()))
    monkeypatch.setattr(gpu_sections, "Hog", FakeHog)
    return FakeWorker


def docs_are_left_alone() -> Iterator[None]:
    """A fixture's body: a test that writes the real page fails."""
    docs = testhost.ROOT / "docs"
    before = {file: file.stat().st_mtime_ns for file in docs.glob("benchmarks*")}
    yield
    assert {file: file.stat().st_mtime_ns for file in docs.glob("benchmarks*")} == before
