"""The command line of the benchmark: sections are measured, their figures added, and the report is written.

Usage: python3 dev.py bench [SECTION ...] [--repeats N] [--device cpu|cuda] [--limit SECONDS] [--out FOLDER]
       python -m tools.measure.bench --device cuda --comfyui DIR --limit SECONDS --out FOLDER

The last one asks no registry: it is run by the Python that it is started with, which needs the requirements of ComfyUI
and of the pack, diffusers, accelerate, requests and websocket-client; for the page matplotlib, for the memory of a
process nvidia-ml-py. PYTHONPATH is not read: install what is missing for that Python; a virtual environment that is
made by the Python of another does not see the other's packages. Figures are written section by section; where there are
only minutes, begin with ``machine server``, then ``decode fit images``: the last part of *images* are rivals that
compile for minutes.
       python3 dev.py bench search --full N [--sampler NAME]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools import commands
from tools.commands import REPORT, SEARCH
from tools.harness import testhost
from tools.harness.errors import UserError
from tools.harness.testhost import say
from tools.measure.bench import search, store
from tools.measure.bench.asked import ENDED_EARLY, Bench
from tools.measure.bench.process import NO_ENGINE, Worker, after, end_all
from tools.measure.bench.sections import OF_DEVICES, SECTIONS

A_SECTION = 30.0
"""Seconds that should be left for a section to be begun."""


def run(names: Sequence[str], bench: Bench, folder: Path) -> Path:
    """Measure sections in that order, add each as soon as it is done, and write the report. Returns its path.

    Raises UserError where there is no such device, and in the end where a section has failed.
    """
    failed: list[str] = []
    if names:
        if bench.device == "cuda":
            require_gpu()
        with Worker(NO_ENGINE, bench.device) as worker:
            machine = worker.ask("machine")
        with after(bench.left(), end_all):
            for name in names:
                if bench.left() < A_SECTION:
                    say(f"dropped for want of time: {name}")
                    continue
                try:
                    figures = SECTIONS[name](bench)
                except Exception as error:  # whatever it is, the others are measured all the same
                    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                    failed.append(f"{name}: {kind}{error}")
                    say(failed[-1])
                else:
                    store.add(folder, bench.device, name, machine, figures)
                    if words := figures.get(ENDED_EARLY):
                        failed.append(f"{name}, in part: {words}")
    page = written(folder)
    if failed:
        raise UserError(f"bench: not measured, as they failed: {'; '.join(failed)}")
    return page


def written(folder: Path) -> Path:
    """The report, written; where matplotlib is not installed, the figures alone. Returns the file's path."""
    try:
        from tools.measure.bench import report
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        say(
            "No page was written: matplotlib is not installed here. Where it is, `python3 dev.py bench report --out "
            f"FOLDER` writes it from {store.NAME}."
        )
        return folder / store.NAME
    return report.write(folder)


def require_gpu() -> None:
    """Raise UserError where PyTorch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA GPU here; expected one. Run on a machine that "
            "has one, or leave the option out to measure the CPU."
        )


def chosen(names: Sequence[str], device: str) -> list[str]:
    """The sections that a command line asks for: without a name all that tell something of that device."""
    if names:
        return [name for name in names if name != REPORT]
    return list(OF_DEVICES[device])


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = commands.parser("bench")
    options = parser.parse_args(arguments)
    if (options.full is None) == (SEARCH in options.sections):
        parser.error(f"--full N goes with {SEARCH}, and {SEARCH} needs it")
    alone = [word for word in (SEARCH, REPORT) if word in options.sections]
    if alone and len(options.sections) > 1:
        parser.error(f"{' '.join(options.sections)}: expected {alone[0]} by itself, or sections")
    if SEARCH in options.sections:
        search.run(options.full, options.sampler)
        return
    if options.own_comfyui:
        testhost.use(options.own_comfyui)
    until = time.monotonic() + options.limit if options.limit else math.inf
    bench = Bench(options.device, options.repeats, until=until)
    say(str(run(chosen(options.sections, options.device), bench, options.out)))


if __name__ == "__main__":
    main(sys.argv[1:])
