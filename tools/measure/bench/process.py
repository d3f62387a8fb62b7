"""One worker process as the command line's process sees it: tasks go in, figures come back, one JSON line each."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakSet

from tools.harness.errors import UserError
from tools.harness.testhost import OPENMP, ROOT

TAIL = 2000  # characters of a failed worker's log that are shown
NO_ENGINE = "no engine"
"""Name of a worker for what needs the pack but none of the engines that are compared."""


class Running(Protocol):
    """What ``end_all`` ends: a worker, or a server."""

    def kill(self) -> None:
        """End it, whatever it is at."""


_running: WeakSet[Running] = WeakSet()


def ends_with_the_others(one: Running) -> None:
    """Have ``end_all`` end it for as long as somebody holds it."""
    _running.add(one)


def end_all() -> None:
    """End all workers and servers at once: whoever waits for one is told that it has failed."""
    for one in list(_running):
        one.kill()


@contextlib.contextmanager
def after(seconds: float, end: Callable[[], object]) -> Iterator[None]:
    """Within this context ``end`` is called when so many seconds are over; never for infinitely many."""
    if seconds == math.inf:
        yield
        return
    watch = threading.Timer(seconds, end)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


class Worker:
    """A process that holds one engine; ends with the ``with`` block."""

    def __init__(self, engine: str, device: str, environment: Mapping[str, str] | None = None) -> None:
        """``environment``: variables beside this process' own."""
        self.engine = engine
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-m", "tools.measure.bench.worker", engine, device],
            cwd=ROOT,
            env={**OPENMP, **os.environ, "TQDM_DISABLE": "1", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        ends_with_the_others(self)

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, task: str, **arguments: Any) -> Any:
        """Have one task done; returns its figures. Raises UserError with the end of the worker's log if it failed."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps([task, arguments]) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            return json.loads(reply)
        status = self._process.wait()
        self._log.seek(0)
        why = "killed, for want of memory or time" if status == -9 else f"exit status {status}"
        raise UserError(
            f"bench: {self.engine} failed at {task} {arguments} ({why}); expected figures. The end of its log:\n"
            + self._log.read()[-TAIL:]
        )
