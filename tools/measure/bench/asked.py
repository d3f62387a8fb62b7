"""What is asked of the benchmark: the device, how often, how long, and how much of each kind."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from tools.harness import testhost
from tools.harness.errors import UserError
from tools.measure.bench import graphs
from tools.measure.bench.graphs import Image
from tools.measure.bench.variants import PRESETS, ROUTINES, VARIANTS

Figures = dict[str, Any]

ENGINES = ("pack", "stock", "diffusers")
COMPILED = ("pack, compiled", "stock, compiled")
WAYS = ("stock", "KOALA Sampler", *VARIANTS)


@dataclass(frozen=True)
class Run:
    """How images are sampled."""

    sampler: str = "euler"
    steps: int = 25
    cfg: float = 7.5
    spacing: str = "leading"

    def __str__(self) -> str:
        return f"{self.sampler}, {self.steps} steps, cfg {self.cfg:g}, {self.spacing}"


@dataclass(frozen=True)
class Survey:
    """What the quality section tries: on the base run everything; on the others, with fewer prompts, reuse alone and
    as few steps."""

    prompts: int = 216
    prompts_of_others: int = 72
    steps: tuple[int, ...] = (6, 8, 9, 10, 11, 12, 13, 15, 18, 20, 22, 24)
    thresholds: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0)
    starts: tuple[float, ...] = (0.4, 0.6, 0.8)
    others: tuple[Run, ...] = (
        *(Run(sampler=sampler) for sampler in ("dpmpp_2m", "ddim", "heun", "res_multistep")),
        Run(steps=10, cfg=3.5, spacing="trailing"),
        *(Run(steps=steps) for steps in (20, 50)),
    )


FULL_SIZE = Image()
FP8 = "fp8_e4m3fn"
WAYS_OF_IMAGES = ("stock", "KOALA Sampler", *PRESETS, "diffusers")


@dataclass(frozen=True)
class Scale:
    """What the sections on whole images draw.

    ``images``: sizes, sampled by the ways ``sampled`` in ``steps`` without decoding; the first size by ``rivals``,
    too, which take turns with the pack. ``served``: what the real server draws, by ``ways``. ``free``: gigabytes of GPU
    memory that are left to everybody, in rounds, what tells most in the first; in them, a server draws ``fitted`` (name
    in the table, way, image), and ``alone`` (name, engine) draw ``served`` in a process of their own each.
    """

    images: tuple[Image, ...] = (FULL_SIZE, Image(px=512), Image(batch=4))
    sampled: tuple[str, ...] = WAYS_OF_IMAGES
    rivals: tuple[str, ...] = ("stock, compiled", "diffusers, fast")
    steps: int = 25
    served: Image = FULL_SIZE
    ways: tuple[str, ...] = (graphs.STOCK, graphs.PACK, "pack, exact", "pack, balanced", "pack, fast", graphs.COMPILED)
    free: tuple[tuple[float, ...], ...] = ((8, 4, 3), (12, 6, 2))
    fitted: tuple[tuple[str, str, Image], ...] = (
        ("KOALA-700M, stock", graphs.STOCK, Image()),
        ("KOALA-700M, exact", "pack, exact", Image()),
        ("KOALA-1B, stock", graphs.STOCK, Image("koala-1b")),
        ("KOALA-1B, exact", "pack, exact", Image("koala-1b")),
        ("KOALA-700M, fp8, stock", graphs.STOCK, Image(weights=FP8)),
        ("KOALA-700M, fp8, exact", "pack, exact", Image(weights=FP8)),
        ("KOALA-1B, fp8, stock", graphs.STOCK, Image("koala-1b", weights=FP8)),
        ("KOALA-1B, fp8, exact", "pack, exact", Image("koala-1b", weights=FP8)),
    )
    alone: tuple[tuple[str, str], ...] = (
        ("KOALA-700M, diffusers, offload", "diffusers, offload"),
        ("SDXL, stock", "SDXL"),
    )


TINY = Image(graphs.BUILT_IN, 128, steps=4)
ON_A_CPU = Scale(
    images=(Image(px=256),),
    rivals=(),
    steps=2,
    served=TINY,
    ways=(graphs.PACK, "pack, exact", "pack, balanced"),
    free=((8, 4),),
    fitted=(("koala-tiny, pack", graphs.PACK, TINY),),
    alone=(),
)
"""On a CPU these sections show that they work, and little more; compiling takes minutes there."""


@dataclass(frozen=True)
class Bench:
    """What was asked for on the command line; ``survey`` is smaller in tests.

    ``until``: the time, as ``time.monotonic`` counts it, by which all should be done.
    """

    device: str = "cpu"
    repeats: int = 3
    survey: Survey = Survey()
    until: float = math.inf

    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    @property
    def scale(self) -> Scale:
        """How much of whole images is drawn."""
        return Scale() if self.device == "cuda" else ON_A_CPU

    @property
    def ways(self) -> tuple[str, ...]:
        """Who takes turns at steps and decoding."""
        if self.device == "cuda":
            return ("pack, exact", *ENGINES, *COMPILED)
        return (*ROUTINES, *ENGINES[1:])

    @property
    def sampled(self) -> tuple[str, ...]:
        """The ways of sampling: on a GPU variants differ by their reuse alone."""
        return (*WAYS[:2], *PRESETS) if self.device == "cuda" else WAYS

    @property
    def steps(self) -> int:
        """Steps of the runs of which a step is timed. At the start of one, things are made that it keeps; on a GPU that
        is not small beside several steps."""
        return 10 if self.device == "cuda" else 4


class Dropped(list[str]):
    """Names of what was left out for want of time, each once."""

    def lacks(self, bench: Bench, seconds: float, what: str) -> bool:
        """Whether so much time is not left; then ``what`` is noted and told."""
        if bench.left() >= seconds:
            return False
        self.note(what)
        return True

    def note(self, what: str) -> None:
        """Note and tell that ``what`` was left out, or was ended."""
        if what not in self:
            self.append(what)
            testhost.say(f"dropped for want of time: {what}")


ENDED_EARLY = "ended early"
"""The key of figures under which a section tells why it stopped in the middle."""
LEFT_OUT = "left out"
"""The key of the names of what it did not reach then."""


@contextlib.contextmanager
def kept(bench: Bench, figures: Figures, measured: Collection[object], at: Callable[[], str]) -> Iterator[None]:
    """What goes wrong in this context ends it, is told and noted in ``figures``, and what was measured before is kept.

    ``measured``: as long as it is empty, there is nothing to keep, and the error is raised. ``at``: tells what is being
    measured, which is ``figures["dropped"]`` where the time is over and all processes were ended.
    """
    try:
        yield
    except (UserError, OSError) as error:  # a server that ends is a ConnectionError, which is an OSError
        if bench.left() <= 0:
            figures["dropped"].note(at())
            return
        if not measured:
            raise
        words = f"at {at()}: {str(error)[-500:]}"
        figures.setdefault(ENDED_EARLY, words)
        testhost.say(f"ended early {words}")
