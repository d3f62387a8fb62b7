"""Sections on what people run on a GPU: whole images, the real server, and what runs in less and less memory.

They run on a CPU, too, where the figures say little, but the same code is at work. What does not fit into the time that
was given is dropped and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy

from tools.harness import testhost
from tools.harness.errors import UserError
from tools.measure.bench import published
from tools.measure.bench.asked import Bench, Dropped, Figures
from tools.measure.bench.graphs import Image
from tools.measure.bench.hog import Hog
from tools.measure.bench.process import NO_ENGINE, Worker
from tools.measure.bench.variants import PRESETS

PROCESSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (NO_ENGINE, ("stock", "KOALA Sampler", *PRESETS)),
    (NO_ENGINE, ("stock, compiled",)),
    ("diffusers", ("diffusers",)),
    ("diffusers, fast", ("diffusers, fast",)),
)
"""Engines, and the ways to an image that share a process: what fails in one of them fails alone. ``sampling.run`` knows
those of ``NO_ENGINE``."""
COMPILING = ("exact", "stock, compiled", "diffusers, fast")
"""Ways that may compile at their first run."""
SAME_AS = {"exact": "KOALA Sampler", "balanced": "KOALA Sampler", "fast": "KOALA Sampler", "stock, compiled": "stock"}
"""What a way's latents are compared with: the same sampler, eager."""
A_RUN = 10.0
"""Seconds that should be left for one more run to be begun."""
A_PROCESS = 40.0
"""The same for a process that loads a model first, or a run that may compile."""


def images(bench: Bench) -> Figures:
    """25 steps without decoding, ways in turn: the first run of each size, later ones, and the first run of another
    process that finds what the first one compiled."""
    found: Figures = {"places": {}, "warm": {}, "apart": {}, "failed": {}, "steps": bench.scale.steps}
    dropped, sampled = Dropped(), bench.scale.sampled
    with _folder() as folder, TemporaryDirectory(prefix="bench-") as cache:
        compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        with ExitStack() as stack:
            ways: dict[str, _Drawer] = {}
            for engine, of_engine in PROCESSES:
                wanted = [way for way in of_engine if way in sampled]
                if wanted and not dropped.lacks(bench, A_PROCESS, ", ".join(wanted)):
                    ways |= dict.fromkeys(wanted, stack.enter_context(_Drawer(bench, folder, compiled, engine)))
            for image in bench.scale.images:
                at, apart = _place(bench, dropped, ways, image, found["failed"])
                found["places"][str(image)], found["apart"][str(image)] = at, apart
        for engine, of_engine in PROCESSES:
            for way in set(of_engine) & set(COMPILING) & set(sampled) - set(found["failed"]):
                if not dropped.lacks(bench, A_PROCESS, f"{way} in a new process"):
                    with _noted(found["failed"], way), _Drawer(bench, folder, compiled, engine) as drawer:
                        found["warm"][way] = drawer.draw(way, bench.scale.images[0])["seconds"]
                        testhost.say(f"images: {way} in a new process: {found['warm'][way]:.3g} s")
    return {**found, "dropped": dropped}


class _Drawer:
    """A process that draws; it starts with its first image. What it says as it fails is a UserError."""

    def __init__(self, bench: Bench, folder: Path, environment: Mapping[str, str], engine: str) -> None:
        self.engine, self.folder, self.steps = engine, str(folder), bench.scale.steps
        self._start = lambda: Worker(engine, bench.device, environment)
        self._stack = ExitStack()
        self._worker: Worker | None = None

    def __enter__(self) -> _Drawer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def draw(self, way: str, image: Image, out: str = "") -> Figures:
        """Seconds of all steps, peak, and what is said of them."""
        worker = self._loaded()
        given = {"folder": self.folder, "px": image.px, "batch": image.batch, "steps": self.steps, "out": out}
        if self.engine == NO_ENGINE:
            made: Figures = worker.ask("sample", way=way, **given)
            return made
        made = worker.ask("step", **given)
        return {**made, "seconds": made["seconds"] * self.steps, "said": ""}

    def _loaded(self) -> Worker:
        if self._worker is None:
            self._worker = self._stack.enter_context(self._start())
            if self.engine == NO_ENGINE:
                self._worker.ask("load_models", folder=self.folder)
            else:
                self._worker.ask("load", what="unet", folder=self.folder)
        return self._worker


@contextmanager
def _noted(failed: dict[str, str], way: str) -> Iterator[None]:
    """What goes wrong with a way is told and noted, and the rest is measured."""
    try:
        yield
    except UserError as error:
        failed[way] = str(error)[-500:]
        testhost.say(f"images: {way}: {error}")


def _place(
    bench: Bench, dropped: Dropped, ways: Mapping[str, _Drawer], image: Image, failed: dict[str, str]
) -> tuple[Figures, dict[str, float]]:
    """One size: each way's runs, and how far its latents are from the same sampler's, eager."""
    at: Figures = {}

    def draw(way: str, out: str = "") -> Figures:
        made: Figures = {}
        with _noted(failed, way):
            made = ways[way].draw(way, image, out)
        if not made:  # its process is gone, and with it what others do in it
            failed.update({other: f"with {way}" for other in ways if ways[other] is ways[way] and other not in failed})
        return made

    with TemporaryDirectory(prefix="bench-") as latents:
        for way in ways:
            need = A_PROCESS if way in COMPILING else A_RUN
            if way in failed or dropped.lacks(bench, need, f"{way} at {image}"):
                continue
            if first := draw(way, f"{latents}/{way}.npy"):
                at[way] = {"first": first["seconds"], "first peak": first["peak"], "again": []}
        for _ in range(bench.repeats):
            for way, figures in at.items():
                if way in failed or dropped.lacks(bench, A_RUN, f"{way} at {image}, again"):
                    continue
                if made := draw(way):
                    figures["again"].append(made["seconds"])
                    figures |= {"peak": made["peak"], "said": made["said"]}
        apart = _apart(Path(latents))
    for way, figures in at.items():
        testhost.say(f"images: {way} at {image}: {figures['first']:.3g} s, then {figures['again']}")
    return {way: figures for way, figures in at.items() if figures["again"]}, apart


def _apart(latents: Path) -> dict[str, float]:
    """Decibels between a way's latents and those of the same sampler, eager, over the range of these."""
    found = {}
    for way, other in SAME_AS.items():
        files = [latents / f"{one}.npy" for one in (way, other)]
        if all(file.is_file() for file in files):
            made, wanted = (numpy.load(file).astype(numpy.float64) for file in files)
            error = max(float(numpy.mean((made - wanted) ** 2)), 1e-20)
            found[way] = float(10 * numpy.log10(numpy.ptp(wanted) ** 2 / error))
    return found


def server(bench: Bench) -> Figures:
    """Prompts to the real server: the first of each graph, and later ones with other seeds."""
    from tools.measure.bench.served import serving

    drawn = bench.scale.served
    found: Figures = {"graphs": {}, "image": f"{drawn.model}, {drawn}, {drawn.steps} steps"}
    dropped = Dropped()
    with serving((drawn.model,)) as served:
        for way in bench.scale.ways:
            if dropped.lacks(bench, A_PROCESS, way):
                continue
            runs: list[Figures] = []
            served.forget()  # so that each graph's first run loads the model
            for i in range(1 + bench.repeats):
                if i and dropped.lacks(bench, A_RUN, f"{way}, again"):
                    break
                runs.append(served.draw(way, drawn))
            found["graphs"][way] = runs
            testhost.say(f"server: {way}: {_told(runs[-1])}")
        found["notes"] = served.notes
    return {**found, "dropped": dropped}


def fit(bench: Bench) -> Figures:
    """What runs, and in how many seconds, where another process leaves so much of the GPU's memory."""
    from tools.measure.bench.served import serving

    scale = bench.scale
    drawn = f"{scale.served}, {scale.served.steps} steps"
    found: Figures = {"free": {str(free): {} for free in scale.free}, "left": {}, "image": drawn}
    dropped, failed = Dropped(), set[str]()
    with Hog(bench.device) as hog:
        with serving(tuple(dict.fromkeys(image.model for _, _, image in scale.fitted))) as served:
            for free in scale.free:
                served.forget()
                found["left"][str(free)] = hog.leave(free)
                for name, way, image in scale.fitted:
                    if name in failed or dropped.lacks(bench, A_RUN, f"{name} in {free} GB"):
                        continue
                    served.draw(way, image)  # the first loads the model
                    _note(found, failed, free, name, served.draw(way, image))
        for name, engine in scale.alone:
            with _folder() as folder:
                for free in scale.free:
                    if name in failed or dropped.lacks(bench, A_PROCESS, f"{name} in {free} GB"):
                        continue
                    hog.leave(free)
                    _note(found, failed, free, name, _alone(bench, engine, folder))
    return {**found, "dropped": dropped}


def _note(found: Figures, failed: set[str], free: float, name: str, made: Figures) -> None:
    found["free"][str(free)][name] = made
    if "error" in made:
        failed.add(name)
    testhost.say(f"fit: {free} GB: {name}: {_told(made)}")


def _told(made: Figures) -> str:
    return f"{made['seconds']:.3g} s" if "seconds" in made else str(made["error"]).splitlines()[0]


def _alone(bench: Bench, engine: str, folder: Path) -> Figures:
    """An image in a process of its own: seconds of sampling and decoding, after the model was loaded."""
    image = bench.scale.served
    try:
        with Worker(engine, bench.device) as worker:
            worker.ask("load", what="everything", folder=str(folder))
            given = {"folder": str(folder), "px": image.px, "steps": image.steps}
            for _ in range(2):  # the second time counts, as the server's does
                made = [worker.ask("step", **given), worker.ask("decode", px=image.px)]
    except UserError as error:
        words = str(error)
        return {"error": words[-500:], "fits": "out of memory" not in words.lower()}
    seconds = made[0]["seconds"] * image.steps + made[1]["seconds"]
    return {"seconds": seconds, "nvml": made[0]["peak"].get("nvml"), "fits": True}


@contextmanager
def _folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="bench-") as temporary:
        yield published.link(Path(temporary))


SECTIONS: Iterable[Callable[[Bench], Figures]] = (images, server, fit)
