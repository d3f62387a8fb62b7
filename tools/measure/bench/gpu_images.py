"""The section on whole images, in the order of what tells most of the pack: what takes minutes to compile comes last.

What does not fit into the time that was given is dropped and named, what was measured before is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy

from tools.harness import testhost
from tools.harness.errors import UserError
from tools.measure.bench import published
from tools.measure.bench.asked import Bench, Dropped, Figures
from tools.measure.bench.graphs import Image
from tools.measure.bench.process import NO_ENGINE, Worker, after

STOCK_LOADER = ("stock", "stock, compiled")
"""Ways that sample the stock loader's MODEL; ``sampling.run`` knows these and the pack's."""
OF_DIFFUSERS = ("diffusers", "diffusers, fast")
"""Ways that are engines themselves."""
COMPILING = ("exact", "stock, compiled", "diffusers, fast")
"""Ways that may compile at their first run."""
SAME_AS = {"exact": "KOALA Sampler", "balanced": "KOALA Sampler", "fast": "KOALA Sampler", "stock, compiled": "stock"}
"""What a way's latents are compared with: the same sampler, eager."""
LIMITS = {"stock, compiled": 120.0, "diffusers, fast": 300.0}
"""Seconds after which a rival's process ends, whatever it is at: some of them compile for minutes."""
EAGER = ("KOALA Sampler", "stock")
"""Ways beside exact that are measured alone, too, for their memory."""
A_RUN = 10.0
"""Seconds that should be left for one more run to be begun."""
A_PROCESS = 40.0
"""The same for a process that loads a model first, or a run that may compile."""


def images(bench: Bench) -> Figures:
    """25 steps without decoding: ways in turn at each size; then some alone in a new process, which finds what was
    compiled; then rivals that compile, in turns with exact."""
    with TemporaryDirectory(prefix="bench-") as temporary:
        (Path(temporary) / "models").mkdir()
        return _Images(bench, published.link(Path(temporary) / "models"), Path(temporary)).measured()


class _Drawer:
    """A process that draws by some ways. It starts with its first image, and anew after a failure. It ends when
    ``limit`` seconds are over. What it says as it fails is a UserError."""

    def __init__(
        self,
        bench: Bench,
        folder: Path,
        environment: Mapping[str, str],
        ways: tuple[str, ...],
        limit: float = math.inf,
    ) -> None:
        self.ways, self._bench, self._folder, self._environment = ways, bench, str(folder), environment
        self._until = math.inf if limit == math.inf else time.monotonic() + limit
        self._stack = ExitStack()
        self._worker: Worker | None = None
        self._drawn: set[tuple[str, Image]] = set()

    def __enter__(self) -> _Drawer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def left(self) -> float:
        """Seconds that are left, to it or to all."""
        return min(self._bench.left(), self._until - time.monotonic())

    def end(self) -> None:
        """End the process."""
        self._worker = None
        self._drawn.clear()
        self._stack.close()

    def has_drawn(self, way: str, image: Image) -> bool:
        """Whether its process has drawn that: the first time does what later ones need not."""
        return (way, image) in self._drawn

    def draw(self, way: str, image: Image, out: str = "") -> Figures:
        """Seconds of all steps, peak, and what is said of them."""
        worker, steps = self._loaded(), self._bench.scale.steps
        given = {"folder": self._folder, "px": image.px, "batch": image.batch, "steps": steps, "out": out}
        made: Figures
        if way in OF_DIFFUSERS:
            made = worker.ask("step", **given)
            made = {**made, "seconds": made["seconds"] * steps, "said": ""}
        else:
            made = worker.ask("sample", way=way, **given)
        self._drawn.add((way, image))
        return made

    def _loaded(self) -> Worker:
        if self._worker is None:
            engine = next((way for way in self.ways if way in OF_DIFFUSERS), NO_ENGINE)
            worker = Worker(engine, self._bench.device, self._environment)
            self._worker = self._stack.enter_context(worker)
            self._stack.enter_context(after(self._until - time.monotonic(), worker.kill))
            if engine == NO_ENGINE:
                loaders = sorted({"stock" if way in STOCK_LOADER else "pack" for way in self.ways})
                worker.ask("load_models", folder=self._folder, loaders=loaders)
            else:
                worker.ask("load", what="unet", folder=self._folder)
        return self._worker


class _Images:
    """The section while it is measured."""

    def __init__(self, bench: Bench, folder: Path, temporary: Path) -> None:
        self.bench, self.scale, self.folder, self.latents = bench, bench.scale, folder, temporary
        self.compiled = {
            "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
            "TRITON_CACHE_DIR": str(temporary / "triton"),
        }
        self.dropped, self.failed = Dropped(), Figures()

    def measured(self) -> Figures:
        """The figures: runs by way at each of the ``places``, of ``alone`` and ``rivals`` at the first of them."""
        first = self.scale.images[0]
        places = self.in_turn()
        alone, rivals = Figures(), Figures()
        with self.drawer("exact") as exact:
            alone |= self.alone("exact", exact, first)
            for way in EAGER:
                with self.drawer(way) as drawer:
                    alone |= self.alone(way, drawer, first)
            for way in self.scale.rivals:
                rivals[way] = self.rival(way, exact, first)
        return {
            "steps": self.scale.steps,
            "sizes": {str(image): [image.px, image.batch] for image in self.scale.images},
            "places": places,
            "alone": alone,
            "rivals": rivals,
            "apart": {str(image): self.apart(image) for image in self.scale.images},
            "failed": self.failed,
            "dropped": self.dropped,
        }

    def drawer(self, *ways: str, limit: float = math.inf) -> _Drawer:
        """A process for some ways."""
        return _Drawer(self.bench, self.folder, self.compiled, ways, limit)

    def in_turn(self) -> Figures:
        """All sizes by all ways that take turns: ComfyUI's share a process, diffusers has its own."""
        places: Figures = {}
        of_comfyui = [way for way in self.scale.sampled if way not in OF_DIFFUSERS]
        with self.drawer(*of_comfyui) as comfyui, self.drawer("diffusers") as diffusers:
            drawers = {way: diffusers if way in OF_DIFFUSERS else comfyui for way in self.scale.sampled}
            for image in self.scale.images:
                at = places[str(image)] = self.first(drawers, image)
                self.again(drawers, at, image, self.bench.repeats)
        return places

    def alone(self, way: str, drawer: _Drawer, image: Image) -> Figures:
        """A way's first run in a new process, and a later one."""
        at = self.first({way: drawer}, image, "alone")
        self.again({way: drawer}, at, image, 1, "alone")
        return at

    def rival(self, way: str, exact: _Drawer, image: Image) -> Figures:
        """A rival's runs, and exact's in turns with its later ones."""
        with self.drawer(way, limit=LIMITS[way]) as drawer:
            at = self.first({way: drawer}, image)
            if at:
                at["exact"] = {"again": []}
                self.again({way: drawer, "exact": exact}, at, image, self.bench.repeats, f"in turn with {way}")
        return at

    def first(self, drawers: Mapping[str, _Drawer], image: Image, note: str = "") -> Figures:
        """Each way's first run; its latents are kept where it is the way's first of all."""
        at: Figures = {}
        for way, drawer in drawers.items():
            out = "" if note else str(self.file(way, image))
            if made := self.draw(drawer, way, image, A_PROCESS if way in COMPILING else A_RUN, note, out):
                at[way] = {"first": made["seconds"], "first peak": made["peak"], "again": []}
                testhost.say(f"images: {way} at {image}, first: {made['seconds']:.3g} s")
        return at

    def again(
        self, drawers: Mapping[str, _Drawer], at: Figures, image: Image, repeats: int, note: str = "again"
    ) -> None:
        """Further runs in turn, added to the figures of each way that is ``at`` the place."""
        for _ in range(repeats):
            for way, figures in at.items():
                if not drawers[way].has_drawn(way, image):  # its process is a new one
                    self.draw(drawers[way], way, image, A_PROCESS, note)
                if made := self.draw(drawers[way], way, image, A_RUN, note):
                    figures["again"].append(made["seconds"])
                    figures |= {"peak": made["peak"], "said": made["said"]}
        for way, figures in at.items():
            testhost.say(f"images: {way} at {image}, {note}: {figures['again']}")

    def draw(self, drawer: _Drawer, way: str, image: Image, seconds: float, note: str, out: str = "") -> Figures:
        """One run. Nothing where the way has failed, where there is no time for it, or where it fails or is ended now;
        all of that is noted, and whoever else draws in that process does so in a new one."""
        what = f"{way} at {image}" + (f", {note}" if note else "")
        if way in self.failed or self.dropped.lacks(self.bench, seconds, what):
            return {}
        if drawer.left() <= 0:
            self.dropped.note(what)
            return {}
        try:
            return drawer.draw(way, image, out)
        except UserError as error:
            over = drawer.left() <= 0
            drawer.end()
            if over:
                self.dropped.note(what)
            else:
                self.failed[way] = {"at": what, "words": str(error)[-500:]}
                testhost.say(f"images: {what} failed: {error}")
            return {}

    def file(self, way: str, image: Image) -> Path:
        """Where a way's latents are."""
        return self.latents / f"{way}, {image}.npy"

    def apart(self, image: Image) -> dict[str, float]:
        """Decibels between a way's latents and those of the same sampler, eager, over the range of these."""
        found = {}
        for way, other in SAME_AS.items():
            files = [self.file(one, image) for one in (way, other)]
            if all(file.is_file() for file in files):
                made, wanted = (numpy.load(file).astype(numpy.float64) for file in files)
                error = max(float(numpy.mean((made - wanted) ** 2)), 1e-20)
                found[way] = float(10 * numpy.log10(numpy.ptp(wanted) ** 2 / error))
        return found
