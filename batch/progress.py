"""The bar of a running job; the same thread tells the workers that the job is to end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batch.ending import Ending

EVERY = 1.0  # seconds
LINE_EVERY = 30.0  # seconds, where there is no terminal
ASKED = "Ctrl+C"


@contextmanager
def shown(ledger: Any, total: int, ending: Ending) -> Iterator[None]:
    """Show how a job gets on. On no terminal: a line twice a minute."""
    console = Console(stderr=True)
    more = TextColumn(
        "{task.fields[rate]:.2f} pictures/s, {task.fields[errors]} errors, {task.fields[workers]} workers"
    )
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), more, console=console, transient=False)
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(ledger, total, ending, bar, over), daemon=True)
    if not console.is_terminal:
        bar.disable = True
    with bar:
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _follow(ledger: Any, total: int, ending: Ending, bar: Progress, over: threading.Event) -> None:
    task = bar.add_task("", total=total, rate=0.0, errors=0, workers=0)
    started = said = time.monotonic()
    told = last = False
    while not last:
        last = over.wait(EVERY)  # once more at the end
        if ending.asked and not told:
            told = True
            ray.get(ledger.stop.remote(ASKED))
            bar.console.print("Finishing what is being drawn. Ctrl+C again ends at once.")
        now = ray.get(ledger.progress.remote())
        finished = now.done + now.errors
        rate = finished / (time.monotonic() - started)
        bar.update(task, completed=finished, rate=rate, errors=now.errors, workers=now.workers)
        if bar.disable and (last or time.monotonic() - said > LINE_EVERY):
            said = time.monotonic()
            print(
                f"{finished} of {total}, {rate:.2f} pictures/s, {now.errors} errors, {now.workers} workers",
                file=sys.stderr,
                flush=True,
            )
