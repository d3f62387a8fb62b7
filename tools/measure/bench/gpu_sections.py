"""Sections on the real server, and on what runs in less and less memory of a GPU.

They run on a CPU, too, where the figures say little, but the same code is at work. What does not fit into the time that
was given is dropped and named; what was measured before a failure is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.harness import testhost
from tools.harness.errors import UserError
from tools.measure.bench import published
from tools.measure.bench.asked import LEFT_OUT, Bench, Dropped, Figures, kept
from tools.measure.bench.hog import Hog
from tools.measure.bench.process import Worker

A_RUN = 10.0
"""Seconds that should be left for one more run to be begun."""
A_PROCESS = 40.0
"""The same for a process that loads a model first, or a run that may compile."""


def server(bench: Bench) -> Figures:
    """Prompts to the real server: the first of each graph, and later ones with other seeds."""
    from tools.measure.bench.served import serving

    drawn = bench.scale.served
    dropped, graphs = Dropped(), dict[str, list[Figures]]()
    found: Figures = {"graphs": graphs, "image": f"{drawn.model}, {drawn}, {drawn.steps} steps", "dropped": dropped}
    way = "its start"
    with kept(bench, found, graphs, lambda: way), serving((drawn.model,), bench.left) as served:
        found["notes"] = served.notes
        for way in bench.scale.ways:
            if dropped.lacks(bench, A_PROCESS, way):
                continue
            served.forget()  # so that each graph's first run loads the model
            for i in range(1 + bench.repeats):
                if i and dropped.lacks(bench, A_RUN, f"{way}, again"):
                    break
                made = served.draw(way, drawn)
                graphs.setdefault(way, []).append(made)
            testhost.say(f"server: {way}: {_told(graphs[way][-1])}")
    found[LEFT_OUT] = [way for way in bench.scale.ways if way not in (*graphs, *dropped)]
    return found


def fit(bench: Bench) -> Figures:
    """What runs, and in how many seconds, where another process leaves so much of the GPU's memory."""
    from tools.measure.bench.served import serving

    scale, fitting = bench.scale, _Fitting(bench)
    models = tuple(dict.fromkeys(image.model for _, _, image in scale.fitted))
    with Hog(bench.device) as hog, _folder() as folder:
        for level_round in scale.free:
            levels = [free for free in level_round if not fitting.dropped.lacks(bench, A_PROCESS, f"{free:g} GB")]
            if not levels:
                continue
            with fitting.kept(), serving(models, bench.left) as served:
                for free in levels:
                    fitting.at = f"{free:g} GB"
                    served.forget()
                    if not fitting.leave(hog, free):
                        continue
                    for name, way, image in scale.fitted:
                        if fitting.wants(name, free, A_RUN):
                            made = served.draw(way, image)  # which loads the model: the second time counts
                            fitting.note(name, free, made if "error" in made else served.draw(way, image))
            for free in levels:
                for name, engine in scale.alone:
                    if fitting.wants(name, free, A_PROCESS) and fitting.leave(hog, free):
                        fitting.note(name, free, _alone(bench, engine, folder))
    return fitting.figures()


class _Fitting:
    """The section ``fit`` while it is measured."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.at = bench, "its start"
        self.free: dict[float, Figures] = {free: {} for levels in bench.scale.free for free in levels}
        self.left: dict[float, int | None] = {}
        self.not_left: dict[float, str] = {}
        self.too_little: dict[str, float] = {}
        """The most memory in which something failed: it is not tried in less."""
        self.dropped, self.ended, self.measured = Dropped(), Figures(), list[str]()
        self.ended["dropped"] = self.dropped

    def kept(self) -> AbstractContextManager[None]:
        """A server that ends leaves what was measured, and what needs no server."""
        return kept(self.bench, self.ended, self.measured, lambda: self.at)

    def leave(self, hog: Hog, free: float) -> bool:
        """Whether so much memory could be left to the others; why not is noted."""
        if free in self.not_left:
            return False
        try:
            self.left[free] = hog.leave(free)
        except UserError as error:
            self.not_left[free] = str(error)
            testhost.say(f"fit: {free:g} GB: {error}")
        return free not in self.not_left

    def wants(self, name: str, free: float, seconds: float) -> bool:
        """Whether something is to be tried in so much memory, and ``seconds`` are left for it."""
        self.at = _in(name, free)
        return free > self.too_little.get(name, 0) and not self.dropped.lacks(self.bench, seconds, self.at)

    def note(self, name: str, free: float, made: Figures) -> None:
        """Note what came of it; what the end of the time has ended is dropped."""
        if "error" in made and self.bench.left() <= 0:
            self.dropped.note(_in(name, free))
            return
        self.free[free][name] = made
        self.measured.append(name)
        if "error" in made:
            self.too_little[name] = max(free, self.too_little.get(name, 0))
        testhost.say(f"fit: {_in(name, free)}: {_told(made)}")

    def figures(self) -> Figures:
        """All of it, and the names of what was not reached."""
        scale = self.bench.scale
        names = [*(name for name, _, _ in scale.fitted), *(name for name, _ in scale.alone)]
        left_out = [
            _in(name, free)
            for free, ways in self.free.items()
            for name in names
            if name not in ways
            and free > self.too_little.get(name, 0)
            and free not in self.not_left
            and f"{free:g} GB" not in self.dropped
        ]
        return {
            "free": {f"{free:g}": ways for free, ways in self.free.items()},
            "left": {f"{free:g}": left for free, left in self.left.items()},
            "not left": {f"{free:g}": words for free, words in self.not_left.items()},
            "image": f"{scale.served}, {scale.served.steps} steps",
            **self.ended,
            LEFT_OUT: [what for what in left_out if what not in self.dropped],
        }


def _in(name: str, free: float) -> str:
    return f"{name} in {free:g} GB"


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


SECTIONS: Iterable[Callable[[Bench], Figures]] = (server, fit)
