"""``dev.py batch-bench``: what `dev.py batch` costs beside a plain loop over one server, and how far it scales.

The larger clusters are simulated: workers that sleep instead of drawing, as threads of Ray's actors on this machine.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from batch import engine, manifest, plan, table, workflow
from batch.comfy import Comfy, Setup
from batch.engine import Pool
from batch.plan import Plan
from batch.store import LOCK, File, Store
from tools import commands
from tools.harness import lifeline, pack
from tools.harness.testhost import ROOT, say
from tools.measure import history, markdown

PAGE, FIGURES = ROOT / "docs" / "batch.md", ROOT / "docs" / "batch.json"
GRAPH = ROOT / "example_workflows" / "01 KOALA-tiny text to image.json"
STEPS = 50
"""Of koala-tiny: about two seconds a picture on two cores."""
PICTURES, ROUNDS = 12, 3
ROWS = 100_000
SIMULATED = {64: 0.32, 512: 2.56}
"""Workers, and seconds that each row takes: 200 rows a second either way, about what two cores can pretend to draw."""
PROCESSES = 8
ALL_START = 600  # seconds in which the workers of a simulation are there: their start is measured by itself


@dataclass(frozen=True)
class Sleeper:
    """Draws nothing, in a given time."""

    seconds: float

    def run(self, graph: Any, canvas: Any) -> tuple[File, ...]:
        """The graph's number, as text."""
        time.sleep(self.seconds)
        return (File(".txt", str(graph["1"]["inputs"]["seed"]).encode()),)

    def restart(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    options = commands.parser("batch-bench").parse_args(arguments)
    packed = pack.archive(ROOT)
    for section, measure in (("overhead", overhead), ("scale", scale)):
        if not options.sections or section in options.sections:
            for figures in measure(packed):
                add({"date": time.strftime("%Y-%m-%d"), "machine": machine(), "section": section, "figures": figures})
    PAGE.write_text(page(), "utf-8")
    return 0


def add(entry: history.Entry) -> None:
    """Keep a measurement beside all that came before."""
    text = history.as_text([*history.read(FIGURES), entry])
    Store(str(FIGURES.parent)).write(FIGURES.name, text.encode())


def machine() -> str:
    """What it is measured on: Linux."""
    told = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{[*names, platform.machine()][0]}, {os.cpu_count()} cores, {memory:.0f} GiB, Ray {ray.__version__}"


# --- beside a plain loop ------------------------------------------------------------------------------------------


def overhead(packed: bytes) -> Iterator[dict[str, Any]]:
    """The same rows through one server in a loop, and through one worker, in turns; and what a start takes."""
    setup = Setup(None, None, None, True, 1)
    loops, jobs, starts = [], [], []
    with engine.connected(None, 1, packed), lifeline.folder("koala-batch-bench-") as folder:
        (folder / engine.PACK).write_bytes(packed)
        job = _planned(setup, folder / engine.PACK)
        for number in range(ROUNDS):
            loops.append(_loop(setup, folder / engine.PACK, job, folder / f"loop-{number}"))
            seconds, start = _job(setup, job, folder / f"job-{number}")
            jobs.append(seconds)
            starts.append(start)
            say(f"a picture: loop {loops[-1]:.3f} s, batch {jobs[-1]:.3f} s; start {start:.1f} s")
    yield {"pictures": PICTURES, "loop": loops, "batch": jobs, "start": starts}


def _planned(setup: Setup, packed: Path) -> Plan:
    comfy = Comfy(setup, packed)
    try:
        found = comfy.object_info()
        read = workflow.read(GRAPH, lambda: found)
        rows = table.grid([f"seed=1..{PICTURES}", f"preset.steps={STEPS}"])
        graph = {name: _custom(node) for name, node in read.graph.items()}
        return plan.make(replace(read, graph=graph, canvas=None), rows, found, comfy.hashes, pack.version(ROOT))
    finally:
        comfy.close()


def _custom(node: dict[str, Any]) -> dict[str, Any]:
    """KOALA Sampler with a number of steps of its own."""
    if node["class_type"] != "KoalaSampler":
        return node
    own = {"preset": "custom", "preset.steps": STEPS, "preset.cfg": 7.5, "preset.spacing": "leading"}
    return {**node, "inputs": {**node["inputs"], **own}}


def _loop(setup: Setup, packed: Path, job: Plan, out: Path) -> float:
    """Seconds a picture, from the first one's end to the last one's."""
    comfy = Comfy(setup, packed)
    out.mkdir()
    try:
        ends = []
        for row in job.rows:
            files = comfy.run(job.recipe.graph(row.number, row.values), None)
            (out / f"{row.id}{files[0].suffix}").write_bytes(files[0].content)
            ends.append(time.monotonic())
    finally:
        comfy.close()
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def _job(setup: Setup, job: Plan, out: Path) -> tuple[float, float]:
    """Seconds a picture, likewise; and from the command to the first picture, without the time that it is drawn in."""
    begun = time.time()
    running = engine.run(job.recipe, job.rows, _store(out), Pool(1, 0, 1), setup)
    outcomes = [one for found in running.outcomes for one in found]
    ends = sorted(one.finished for one in outcomes)
    first = min(outcomes, key=lambda one: one.finished)
    return (ends[-1] - ends[0]) / (len(ends) - 1), ends[0] - begun - (first.seconds or 0)


def _store(out: Path) -> Store:
    """A folder as a job holds it."""
    out.mkdir()
    (out / LOCK).touch()
    return Store(str(out))


# --- simulated ----------------------------------------------------------------------------------------------------


def scale(packed: bytes) -> Iterator[dict[str, Any]]:
    """A hundred thousand rows for workers that sleep."""
    for workers, seconds in SIMULATED.items():
        with lifeline.folder("koala-batch-bench-") as folder, engine.connected(None, PROCESSES, packed):
            figures = _simulated(workers, seconds, _store(folder / "out"))
            say(", ".join(f"{name} {value}" for name, value in figures.items()))
            yield figures


def _simulated(workers: int, seconds: float, store: Store) -> dict[str, Any]:
    graph = {"1": {"class_type": "Sleeper", "inputs": {"seed": 0}}}
    read = workflow.Workflow("sleepers", graph, None)
    known = {"Sleeper": {"input": {"required": {"seed": ["INT", {}]}}}}
    job = plan.make(read, table.grid([f"seed=1..{ROWS}"]), known, lambda _: {}, "")
    pool, threads = Pool(PROCESSES, 0, PROCESSES), workers // PROCESSES
    memory, parts, done = [], 0, 0
    ray.data.DataContext.get_current().wait_for_min_actors_s = ALL_START
    with manifest.Recorder(store) as record:
        running = engine.run_with(job.recipe, job.rows, store, pool, _starter(seconds), threads)
        ends = []
        for outcomes in running.outcomes:
            record.add(outcomes)
            ends += [one.finished for one in outcomes]
            if len(ends) * 20 // ROWS > done:
                done = len(ends) * 20 // ROWS
                memory.append(_most_memory())
                parts = max(parts, len(store.names(manifest.PARTS)))
    begun = min(ends) - seconds
    manifest.merge(store)
    whole = manifest.read(store)
    return {
        "workers": workers,
        "processes": PROCESSES,
        "seconds a row": seconds,
        "rows": len(whole),
        "seconds": round(max(ends) - begun, 1),
        "efficiency": round(ROWS * seconds / workers / (max(ends) - begun), 4),
        "memory": memory,
        "parts of the manifest before the end": parts,
    }


def _most_memory() -> int:
    """The driver's peak until now, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def _starter(seconds: float) -> Any:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # this module is not sent to workers
    return lambda: Sleeper(seconds)


# --- the page -----------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/batch.md, from the newest figures."""
    entries = history.read(FIGURES)
    newest = {entry["section"]: entry for entry in entries if entry["section"] == "overhead"}
    scales = {entry["figures"]["workers"]: entry for entry in entries if entry["section"] == "scale"}
    lines = [
        "# `dev.py batch`, measured",
        "",
        "Written by `python3 dev.py batch-bench`; every figure with its date is in [batch.json](batch.json).",
        "How to use it: [batch/README.md](../batch/README.md).",
        "",
    ]
    if entry := newest.get("overhead"):
        lines += _overhead_lines(entry)
    if scales:
        lines += _scale_lines([scales[workers] for workers in sorted(scales)])
    return "\n".join(lines)


def _overhead_lines(entry: dict[str, Any]) -> list[str]:
    figures = entry["figures"]
    ratios = [own / loop for own, loop in zip(figures["batch"], figures["loop"], strict=True)]
    middle = statistics.median(ratios)
    return [
        "## Beside a plain loop",
        "",
        f"{entry['date']}, {entry['machine']}. {figures['pictures']} pictures by koala-tiny through one server, in a "
        f"loop and by one worker, in turns, {len(ratios)} times; from the first picture's end to the last one's.",
        "",
        *markdown.table(
            ("", *(f"round {number}" for number in range(1, len(ratios) + 1))),
            (
                ("plain loop, s a picture", *(f"{value:.3f}" for value in figures["loop"])),
                ("dev.py batch, s a picture", *(f"{value:.3f}" for value in figures["batch"])),
                ("ratio", *(f"{value:.3f}" for value in ratios)),
                ("start of the worker, s", *(f"{value:.1f}" for value in figures["start"])),
            ),
        ),
        "",
        f"Target: at most 5 % more. **{'Met' if middle <= 1.05 else 'Not met'}**: {middle - 1:+.1%} (median). The "
        "start is that of Ray's actor and ComfyUI, model files checked, without the first picture; the pack is packed "
        "once, before it, for all workers.",
        "",
    ]


def _scale_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        (
            figures["workers"],
            figures["seconds a row"],
            f"{figures['workers'] / figures['seconds a row']:.0f}",
            figures["rows"],
            figures["seconds"],
            f"{figures['efficiency']:.1%}",
            f"{figures['memory'][0]}, {figures['memory'][-1]}",
            figures["parts of the manifest before the end"],
        )
        for figures in (entry["figures"] for entry in entries)
    ]
    head = (
        "workers",
        "s a row",
        "rows a second, without any pause",
        "rows",
        "s in all",
        "efficiency",
        "peak of the driver, MB, after 5 % and at the end",
        "parts of the manifest on the way",
    )
    met = all(entry["figures"]["efficiency"] >= 0.95 for entry in entries)
    first = entries[0]
    return [
        "## Many workers, simulated",
        "",
        f"{first['date']}, {first['machine']}. The workers sleep instead of drawing, as threads of "
        f"{first['figures']['processes']} of Ray's actors on this one machine; all else is as in a job: Ray Data hands "
        "out the rows, each worker asks the ledger before each, writes a file, and the driver writes the "
        "manifest. Efficiency, once all workers have started: the time that the rows would take without any pause, "
        "over the time they took.",
        "",
        *markdown.table(head, rows),
        "",
        f"Target: at least 95 %. **{'Met' if met else 'Not met'}**, at this many rows a second; Ray, the ledger "
        "and the driver take most of two cores' time then.",
        "",
    ]
