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
class Answer:
    """What the ledger says of a row that a worker is about to begin."""

    verdict: Verdict
    tried: bool
    """It was begun before: its picture may be there."""
    why: str
    """What ended the try before."""


@dataclass(frozen=True)
class Ended:
    """A row whose picture is there, or whose error is known."""

    row_id: str
    error: bool


@dataclass(frozen=True)
class Progress:
    """Of this run."""

    done: int = 0
    errors: int = 0
    workers: int = 0
    """That have been heard of lately."""
    stopped: str | None = None
    """Why no further row is begun."""
    retired: tuple[str, ...] = ()
    """Why some workers could not go on."""


class Ledger:
    """Ray runs its methods one after the other."""

    def __init__(self, workers: int) -> None:
        """``workers``: how many there are to be."""
        self._workers = workers
        self._starts: Counter[str] = Counter()
        self._why: dict[str, str] = {}
        self._ended: dict[str, bool] = {}  # id -> whether it has an error
        self._running: set[str] = set()  # workers
        self._ran = time.monotonic()  # when one was running last
        self._heard: dict[str, float] = {}
        self._stopped: str | None = None
        self._retired: list[str] = []

    def begin(self, worker: str, row_id: str, why: str = "", ended: Ended | None = None) -> Answer:
        """Before each try of a row; ``why``: what has ended the one before; ``ended``: the worker's row until now.

        Two messages in one: a cluster's rows are only as quick as this actor.
        """
        if ended:
            self.end(worker, ended)
        self.leave(worker)
        if why:
            self._why[row_id] = why
        tried = row_id in self._ended or self._starts[row_id] > 0
        if self._stopped:
            verdict = Verdict.LEAVE
        elif self._starts[row_id] >= MOST_STARTS:
            verdict = Verdict.SET_ASIDE
        else:
            verdict = Verdict.DRAW
            self._running.add(worker)
            self._starts[row_id] += 1
        return Answer(verdict, tried, self._why.get(row_id, ""))

    def end(self, worker: str, ended: Ended) -> None:
        """A row is done, or has its error."""
        self.leave(worker)
        self._starts.pop(ended.row_id, None)
        self._ended[ended.row_id] = ended.error

    def leave(self, worker: str) -> None:
        """The worker has no row."""
        self.beat(worker)
        self._running.discard(worker)

    def beat(self, worker: str) -> None:
        """The worker is there."""
        now = time.monotonic()
        self._heard[worker] = now
        if self._running:
            self._ran = now

    def retire(self, reason: str) -> None:
        """A worker cannot go on; the job ends with the last one."""
        self._retired.append(reason)
        if len(self._retired) >= self._workers:
            self.stop(reason)

    def stop(self, reason: str) -> None:
        """Let no further row be begun; the first reason stays."""
        self._stopped = self._stopped or reason

    def is_over(self) -> bool:
        """No row is begun any more; or some were, and none has been for a while."""
        self._running &= self._alive()
        idle = time.monotonic() - self._ran > LOST_AFTER and not self._running
        return bool(self._stopped) or (idle and bool(self._starts or self._ended))

    def progress(self) -> Progress:
        """As of now."""
        errors = sum(self._ended.values())
        retired = tuple(dict.fromkeys(self._retired))
        return Progress(len(self._ended) - errors, errors, len(self._alive()), self._stopped, retired)

    def _alive(self) -> set[str]:
        now = time.monotonic()
        return {worker for worker, heard in self._heard.items() if now - heard < LOST_AFTER}
