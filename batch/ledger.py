"""What is known of a running job in one place: a Ray actor beside the driver, which all workers tell and ask."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum

MOST_STARTS = 3
"""How often a row may be begun: one that ends its server or worker so often is set aside."""
HEARTBEAT = 5.0  # seconds
LOST_AFTER = 3 * HEARTBEAT


class Verdict(Enum):
    """What a worker does with a row."""

    DRAW = "draw"
    SET_ASIDE = "set aside"
    LEAVE = "leave"  # the job ends: it is for the next run


@dataclass(frozen=True)
class Progress:
    """Of this run."""

    done: int = 0
    errors: int = 0
    running: int = 0
    workers: int = 0
    """That have been heard of lately."""
    stopped: str | None = None
    """Why no further row is begun."""


class Ledger:
    """Ray runs its methods one after the other."""

    def __init__(self) -> None:
        self._starts: Counter[str] = Counter()
        self._running: dict[str, str] = {}  # worker -> id of its row
        self._heard: dict[str, float] = {}
        self._done = self._errors = 0
        self._stopped: str | None = None

    def begin(self, worker: str, row_id: str) -> tuple[Verdict, int]:
        """Before each try of a row; the number of tries that came before is returned, too."""
        self.beat(worker)
        self._running.pop(worker, None)
        if self._stopped:
            return Verdict.LEAVE, self._starts[row_id]
        if self._starts[row_id] >= MOST_STARTS:
            return Verdict.SET_ASIDE, self._starts[row_id]
        self._running[worker] = row_id
        self._starts[row_id] += 1
        return Verdict.DRAW, self._starts[row_id] - 1

    def end(self, worker: str, row_id: str, error: bool) -> None:
        """A row is done, or has its error."""
        self.beat(worker)
        self._running.pop(worker, None)
        self._starts.pop(row_id, None)
        self._done += not error
        self._errors += error

    def leave(self, worker: str) -> None:
        """The worker has put its row down."""
        self._running.pop(worker, None)

    def beat(self, worker: str) -> None:
        """The worker is there."""
        self._heard[worker] = time.monotonic()

    def stop(self, reason: str) -> None:
        """Let no further row be begun; the first reason stays."""
        self._stopped = self._stopped or reason

    def progress(self) -> Progress:
        """As of now."""
        now = time.monotonic()
        self._heard = {worker: heard for worker, heard in self._heard.items() if now - heard < LOST_AFTER}
        running = self._running.keys() & self._heard.keys()
        return Progress(self._done, self._errors, len(running), len(self._heard), self._stopped)
