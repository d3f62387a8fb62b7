"""The command line of the benchmark: sections are measured, their figures added, and the report is written.

Usage: python3 dev.py bench [SECTION ...] [--repeats N] [--device cpu|cuda]
       python3 dev.py bench search --full N [--sampler NAME]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tools import commands
from tools.commands import REPORT, SEARCH
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT, say
from tools.measure.bench import report, search, store
from tools.measure.bench.process import NO_ENGINE, Worker
from tools.measure.bench.sections import SECTIONS, Bench, wanted


def run(names: Sequence[str], bench: Bench, folder: Path) -> Path:
    """Measure sections in that order, add each as soon as it is done, and write the report. Returns its path.

    Raises UserError where there is no such device, or a worker fails.
    """
    if names:
        if bench.device == "cuda":
            require_gpu()
        with Worker(NO_ENGINE, bench.device) as worker:
            machine = worker.ask("machine")
        for name in names:
            store.add(folder, bench.device, name, machine, SECTIONS[name](bench))
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
    return wanted(device)


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
    bench = Bench(options.device, options.repeats)
    say(str(run(chosen(options.sections, options.device), bench, ROOT / "docs")))


if __name__ == "__main__":
    main(sys.argv[1:])
