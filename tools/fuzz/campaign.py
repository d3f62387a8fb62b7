"""``dev.py fuzz``: many damaged files, one after the other; each is refused by name, or loaded as it is."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sdxl_clip
import torch

from tools import commands
from tools.fuzz import cases, oracle
from tools.fuzz.bases import Base, bases, contents, write
from tools.fuzz.oracle import FAULTS, Verdict
from tools.measure import reliability


@dataclass(frozen=True)
class Result:
    """A case that ran."""

    number: int
    base: Base
    did: str
    verdict: Verdict

    @property
    def line(self) -> str:
        return f"{self.number}: {self.base.name}: {self.did}\n    {self.verdict.outcome}: {self.verdict.text}"


@contextmanager
def prepared() -> Iterator[None]:
    """ComfyUI says nothing, needs no gradients, and builds CLIP's tokenizer, the same for every text encoder, once."""
    built: list[Any] = []
    make: Any = comfy.sdxl_clip.SDXLTokenizer

    def tokenizer(*arguments: Any, **options: Any) -> Any:
        if not built:
            built.append(make(*arguments, **options))
        return built[0]

    comfy.sdxl_clip.SDXLTokenizer = tokenizer
    logging.disable(logging.CRITICAL)
    try:
        with torch.inference_mode():
            yield
    finally:
        logging.disable(logging.NOTSET)
        comfy.sdxl_clip.SDXLTokenizer = make


def run(seed: int, numbers: Iterable[int]) -> Iterator[Result]:
    """Cases of a seed, in the order of their numbers. Call it within ``prepared``."""
    every = list(bases())
    clean: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="koala-fuzz-") as temporary:
        folder = Path(temporary)
        for number in numbers:
            case = cases.case(every, seed, number)
            base = case.base
            if base.name not in clean:
                clean[base.name] = oracle.learn(base, write(base, contents(base), folder, f"whole-{len(clean)}"))
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
                verdict = oracle.judge(
                    base, clean[base.name], write(base, case.contents, Path(place), f"case-{number}")
                )
            if number % 50 == 0:
                gc.collect()
            yield Result(number, base, case.did, verdict)


def figures(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """Kind of file -> outcome -> number of cases."""
    counted = Counter((result.base.kind, result.verdict.outcome) for result in results)
    return {kind: {what: count for (of, what), count in counted.items() if of == kind} for kind in cases.SHARES}


def main(arguments: list[str]) -> int:
    """Run a campaign and name its faults; the exit status is 1 where there is any."""
    options = commands.parser("fuzz").parse_args(arguments)
    numbers = range(options.cases) if options.only is None else [options.only]
    start, results = time.monotonic(), []
    with prepared():
        for result in run(options.seed, numbers):
            results.append(result)
            if result.verdict.outcome in FAULTS or options.only is not None:
                print(result.line, flush=True)
    for kind, outcomes in figures(results).items():
        print(f"{kind}: {', '.join(f'{count} {what}' for what, count in outcomes.items()) or 'none'}")
    if options.record and options.only is None:
        found: dict[str, Any] = {"seed": options.seed, "cases": options.cases, "kinds": figures(results)}
        reliability.record("fuzz", {**found, "seconds": round(time.monotonic() - start)})
    faults = sum(result.verdict.outcome in FAULTS for result in results)
    print(f"{len(results)} cases of seed {options.seed} in {time.monotonic() - start:.0f} s: {faults} faults")
    return int(faults > 0)
