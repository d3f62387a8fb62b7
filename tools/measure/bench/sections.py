"""The sections of the benchmark: each gives workers tasks in turn, and returns figures that JSON can hold."""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import numpy

from tools.harness import testhost
from tools.harness.assets import SHIPPED
from tools.measure.bench import gpu_images, gpu_sections, peers, published
from tools.measure.bench.asked import COMPILED, ENGINES, Bench, Dropped, Figures, Run, Survey, kept
from tools.measure.bench.peers import OPENVINO
from tools.measure.bench.process import NO_ENGINE, Worker
from tools.measure.bench.stats import bracket
from tools.measure.bench.variants import REUSE_ALONE, ROUTINES, VARIANTS

LOW_MEMORY = "pack, fp16 weights"
SIZES = (256, 512, 768, 1024)
BATCHES = (1, 2, 4)
LARGE = 512  # px; above, a CPU's first time counts, for all that is slow there has been done at a smaller size
DECODED = (512, 1024)
FIRST_STEP = 256  # px of the step that shows what loading has put off
OVERHEAD = ((100, "koala-tiny", 128), (4, "koala-700m", 256))
"""Pairs of runs for each repeat, the model, and the size: what KOALA Sampler adds to KSampler is small beside noise."""
OVERHEAD_STEPS = 4


def machine(bench: Bench) -> Figures:
    """The machine's rates."""
    with Worker(NO_ENGINE, bench.device) as worker:
        return {**worker.ask("rates"), "faster": worker.ask("probes")}


def macs(bench: Bench) -> Figures:
    """Multiplications of a pass, by size, operation and block."""
    with Worker(NO_ENGINE, "cpu") as worker:
        return worker.ask("macs", sizes=list(SIZES))


def load(bench: Bench) -> Figures:
    """Loading and then the first step, every time in a new process, the files in the page cache."""
    found: Figures = {what: defaultdict(list) for what in ("everything", "first step", "unet", "again")}
    with _folder() as folder:
        published.read_once(folder)
        for _ in range(bench.repeats):
            for engine in ENGINES:
                with Worker(engine, bench.device) as worker:
                    found["everything"][engine].append(worker.ask("load", what="everything", folder=str(folder)))
                    found["first step"][engine].append(worker.ask("step", folder=str(folder), px=FIRST_STEP))
                    found["again"][engine].append(worker.ask("load", what="everything", folder=str(folder)))
                with Worker(engine, bench.device) as worker:
                    found["unet"][engine].append(worker.ask("load", what="unet", folder=str(folder)))
                say("load", engine, found["everything"][engine][-1]["seconds"])
    return found


def step(bench: Bench) -> Figures:
    """Seconds a guided step by size and by batch, engines in turn; then SDXL's U-Net alone, for the ratio.

    Where time is limited, what comes last is dropped: how long it will take is known from the smallest size.
    """
    dropped, batches, sdxl = Dropped(), Figures(), Figures()
    with _folder() as folder, ExitStack() as stack:
        ways = _ways(bench.ways, bench, stack, folder, "unet")
        given = {"folder": str(folder), "steps": bench.steps}
        began = time.monotonic()
        sizes = {str(SIZES[0]): _in_turn(bench, ways, "step", {**given, "px": SIZES[0]})}
        took = time.monotonic() - began

        def lacks(px: int, batch: int = 1) -> bool:
            return dropped.lacks(bench, took * batch * (px / SIZES[0]) ** 2, f"{px} px, batch {batch}")

        difference = _differences(ways, "step", {**given, "px": SIZES[0]})
        for px in SIZES[1:]:
            if not lacks(px):
                sizes[str(px)] = _in_turn(bench, ways, "step", {**given, "px": px})
        for batch in BATCHES:
            if not lacks(SIZES[0], batch):
                batches[str(batch)] = _in_turn(bench, ways, "step", {**given, "px": SIZES[0], "batch": batch})
        stack.close()  # SDXL needs the memory
        if not dropped.lacks(bench, 4 * took, "SDXL"):
            sdxl_ways = _ways(("SDXL",), bench, stack, folder, "unet")
            for px in SIZES[:2]:
                sdxl[str(px)] = _in_turn(bench, sdxl_ways, "step", {**given, "px": px})["SDXL"]
            stack.close()
        beside, why_not = _peers(bench, dropped, folder, took)
    return {
        "steps": bench.steps,
        "sizes": sizes,
        "batches": batches,
        "sdxl": sdxl,
        "difference": difference,
        "peers": beside,
        "without peers": why_not,
        "dropped": dropped,
    }


def _peers(bench: Bench, dropped: Dropped, folder: Path, took: float) -> tuple[Figures, str]:
    """Steps of what is measured only where it is installed, in turn with the pack alone, as it takes much memory; or
    why not. ``took``: seconds of the smallest size's turns."""
    if why_not := peers.why_not(OPENVINO, bench.device):
        testhost.say(why_not)
        return {}, why_not
    found: Figures = {}
    with ExitStack() as stack:
        if not dropped.lacks(bench, 4 * took, OPENVINO):
            ways = _ways(("pack, exact", OPENVINO), bench, stack, folder, "unet")
            for px in SIZES[:2]:
                found[str(px)] = _in_turn(bench, ways, "step", {"folder": str(folder), "steps": bench.steps, "px": px})
    return found, ""


def decode(bench: Bench) -> Figures:
    """Seconds of decoding a latent, engines in turn, and how far their pictures are apart."""
    found: Figures = {"sizes": {}, "difference": {}, "types": {}, "dropped": Dropped()}
    at, sizes = "loading", Figures()
    with kept(bench, found, found["difference"], lambda: at), _folder() as folder, ExitStack() as stack:
        ways = _ways([way for way in bench.ways if way not in COMPILED], bench, stack, folder, "vae")
        found["types"] = {way: worker.ask("types")["vae"] for way, (worker, _) in ways.items()}
        at = f"{DECODED[0]} px, difference"
        found["difference"][str(DECODED[0])] = _differences(ways, "decode", {"px": DECODED[0]})
        for px in DECODED:
            at = f"{px} px"
            sizes[str(px)] = Figures((way, []) for way in ways)
            _in_turn(bench, ways, "decode", {"px": px}, sizes[str(px)])
    found["sizes"] = {px: runs for px, ways in sizes.items() if (runs := _whole_turns(ways))}
    return found


def _whole_turns(ways: Figures) -> Figures:
    """Runs by way without those of a turn that was not finished; nothing where none was."""
    turns = min(map(len, ways.values()))
    return {way: runs[:turns] for way, runs in ways.items()} if turns else {}


def sample(bench: Bench) -> Figures:
    """Sampling, ways in turn: 25 steps at 512 px; and many short runs for what KOALA Sampler adds to KSampler."""
    with _folder() as folder, Worker(NO_ENGINE, bench.device) as worker:
        runs: dict[str, list[float]] = defaultdict(list)
        said = {}
        worker.ask("load_models", folder=str(folder))
        worker.ask("sample", way="KOALA Sampler", folder=str(folder), px=512, steps=1)  # the first is slower
        for _ in range(bench.repeats):
            for way in bench.sampled:
                made = worker.ask("sample", way=way, folder=str(folder), px=512, steps=25)
                runs[way].append(made["seconds"])
                said[way] = made["said"]
                say("sample", way, made["seconds"])
        overhead = {}
        for pairs, name, px in reversed(OVERHEAD):  # the large model is there already
            model = name if name == "koala-tiny" else str(folder)
            worker.ask("load_models", folder=model)
            times: dict[str, list[float]] = defaultdict(list)
            for i in range(1 + pairs * bench.repeats):
                ways = ("KSampler", "KOALA Sampler") if i % 2 else ("KOALA Sampler", "KSampler")
                for way in ways:
                    made = worker.ask("sample", way=way, folder=model, px=px, steps=OVERHEAD_STEPS)
                    times[way] += [made["seconds"]] if i else []
            overhead[f"{name}, {px} px, {OVERHEAD_STEPS} steps"] = times
            say("sample", name, times["KOALA Sampler"][-1])
    return {"runs": runs, "said": said, "overhead": overhead}


def memory(bench: Bench) -> Figures:
    """Peak memory of loading everything, two steps and decoding at 512 px, each engine in a process of its own."""
    found: Figures = defaultdict(list)
    with _folder() as folder:
        published.read_once(folder)
        for _ in range(bench.repeats):
            for engine in ("pack", LOW_MEMORY, "stock", "diffusers"):
                with Worker(engine, bench.device) as worker:
                    loading = worker.ask("load", what="everything", folder=str(folder))
                    steps = worker.ask("step", folder=str(folder), px=512, steps=2)
                    decoding = worker.ask("decode", px=512)
                parts = {"load": loading["peak"], "step": steps["peak"], "decode": decoding["peak"]}
                found[engine].append(parts)
                say("memory", engine, max(part["ram"] for part in parts.values()) / 1e9, "GB")
    return found


def judged_model() -> str:
    """The koala-tiny whose images are judged: the beginning of its file's SHA-256."""
    return hashlib.sha256(SHIPPED.read_bytes()).hexdigest()[:12]


def quality(bench: Bench) -> Figures:
    """koala-tiny's images with work left out, against those with all steps: always on the CPU. Nothing is timed, so the
    processors are shared by several workers."""
    survey, count = bench.survey, min(JUDGES, os.cpu_count() or 1)
    with ExitStack() as stack:
        threads = {"OMP_NUM_THREADS": str((os.cpu_count() or 1) // count)}
        workers = [stack.enter_context(Worker(NO_ENGINE, "cpu", threads)) for _ in range(count)]
        pool = stack.enter_context(ThreadPoolExecutor(count))
        free: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            free.put(worker)

        def load(prompts: int) -> float:
            found: list[Figures] = list(pool.map(lambda worker: worker.ask("load_prompts", prompts=prompts), workers))
            return float(found[0]["shallow"])

        def judge(family: str, value: Any, run: Run, base: Run) -> Figures:
            patch, worker = "" if family in (ALL, FEWER) else family, free.get()
            try:
                found = worker.ask("quality", patch=patch, value=value, run=asdict(run), reference=asdict(base))
            finally:
                free.put(worker)
            say("quality", f"{base}: {family} {value}", found["psnr"], "dB")
            return {"run": str(base), "family": family, "value": value, **found}

        def judged(family: str, values: Iterable[Any], base: Run) -> list[Figures]:
            return list(pool.map(lambda value: judge(family, value, base, base), values))

        def compare(base: Run, variants: Iterable[str], steps: Iterable[int]) -> list[Figures]:
            rows = judged(ALL, [base.steps], base) + judged(OURS, variants, base)
            fewer = {*steps, *(step for row in rows[1:] for step in bracket(base.steps, row["cost"]))} - {base.steps}
            return rows + list(
                pool.map(lambda steps: judge(FEWER, steps, replace(base, steps=steps), base), sorted(fewer))
            )

        shallow = load(survey.prompts)
        rows = compare(Run(), VARIANTS, survey.steps)
        for rival, values in _rivals(survey).items():
            rows += judged(rival, values, Run())
        load(survey.prompts_of_others)
        for base in survey.others:
            rows += compare(base, REUSE_ALONE, ())
    prompts = {"prompts": survey.prompts, "prompts_of_others": survey.prompts_of_others}
    return {"model": judged_model(), "shallow": shallow, **prompts, "base": str(Run()), "rows": rows}


JUDGES = 4
"""Workers of the quality section at most; each holds a model and a batch of images."""
ALL, OURS, FEWER = "all steps", "KOALA Accelerate", "fewer steps"
"""Families of settings that the quality section compares; ``RIVALS`` are the others."""
RIVALS = ("EasyCache", "LazyCache", "CFGOverride")
SECTIONS: Mapping[str, Callable[[Bench], Figures]] = {
    section.__name__: section
    for section in (
        machine,
        macs,
        load,
        step,
        decode,
        sample,
        memory,
        quality,
        gpu_images.images,
        *gpu_sections.SECTIONS,
    )
}


OF_DEVICES = {
    "cpu": ("machine", "macs", "load", "step", "decode", "sample", "memory", "quality"),
    "cuda": ("machine", "images", "server", "load", "decode", "fit", "memory"),
}
"""The sections that tell something of a device, in the order in which they are measured."""


def _rivals(survey: Survey) -> dict[str, Sequence[float]]:
    return {"EasyCache": survey.thresholds, "LazyCache": survey.thresholds, "CFGOverride": survey.starts}


@contextmanager
def _folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="bench-") as temporary:
        yield published.link(Path(temporary))


Ways = Mapping[str, tuple[Worker, Figures]]
"""Who does it: a worker, and what it is told beside the task's own arguments."""


def _ways(names: Iterable[str], bench: Bench, stack: ExitStack, folder: Path, part: str) -> Ways:
    """Workers that have loaded a part; "pack, exact" and "pack, bf16" are one worker's, with other routines."""
    workers: dict[str, Worker] = {}
    ways = {}
    for name in names:
        engine, routines = ("pack", ROUTINES[name]) if name in ROUTINES else (name, "")
        if engine not in workers:
            workers[engine] = stack.enter_context(Worker(engine, bench.device))
            workers[engine].ask("load", what=part, folder=str(folder))
        ways[name] = (workers[engine], {"routines": routines})
    return ways


def _in_turn(bench: Bench, ways: Ways, task: str, arguments: Figures, into: Figures | None = None) -> Figures:
    """Each way once more for every repeat. A first time does not count, on a GPU at any size, where it searches
    algorithms and takes memory; on a CPU up to ``LARGE`` px. ``into``: gets them run by run."""
    found: Figures = defaultdict(list) if into is None else into
    first = int(bench.device == "cuda" or arguments["px"] <= LARGE)
    for i in range(first + bench.repeats):
        for way, (worker, further) in ways.items():
            made = worker.ask(task, **arguments, **further)
            if i >= first:
                found[way].append(made)
    for way, made in found.items():
        say(task, f"{way} {arguments['px']} px, batch {arguments.get('batch', 1)}", made[-1]["seconds"])
    return found


def _differences(ways: Ways, task: str, arguments: Figures) -> dict[str, float]:
    """Largest difference of what the others make from what stock makes, for steps over the largest value in it."""
    with TemporaryDirectory(prefix="bench-") as temporary:
        made = {}
        for way, (worker, further) in ways.items():
            worker.ask(task, **arguments, **further, out=f"{temporary}/made.npy")
            made[way] = numpy.load(f"{temporary}/made.npy")
    unit = 1.0 if task == "decode" else float(numpy.abs(made["stock"]).max())
    return {way: float(numpy.abs(array - made["stock"]).max()) / unit for way, array in made.items()}


def say(section: str, what: str, figure: float, unit: str = "s") -> None:
    """Show that something is going on."""
    testhost.say(f"{section}: {what}: {figure:.3g} {unit}")
