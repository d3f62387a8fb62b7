"""Time and memory that a test run takes, with every process below it: told above pytest's summary."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest


class Usage:
    """A pytest plugin that watches from when it is made."""

    EVERY = 0.5  # seconds between two looks at the memory
    AGAIN = 5.0  # seconds between two long ones

    def __init__(self) -> None:
        self.peak = 0
        self._running: set[str] = set()
        self._at_peak: list[str] = []
        self._begun = time.monotonic()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running.add(nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._running.discard(nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        self._over.set()
        self._watch.join()
        minutes = (time.monotonic() - self._begun) / 60
        terminalreporter.write_line(f"time: {minutes:.1f} minutes, of processors {sum(processor_seconds()) / 60:.1f}")
        for test in self._at_peak:
            terminalreporter.write_line(f"  {test}")
        terminalreporter.write_line(f"peak memory: {self.peak / 1e9:.1f} GB")

    def _look(self) -> None:
        """Finding out what a process shares takes long. It is done when all pages together (a shared one counted once
        for each of its processes) are more than ever, and every few seconds while they exceed the peak."""
        most, later = 0, 0.0
        while not self._over.wait(self.EVERY):
            now, clock = sum(resident()), time.monotonic()
            if now > 1.01 * most or (now > self.peak and clock > later):
                most, later = max(most, now), clock + self.AGAIN
                held = sum(own_share())
                if held > self.peak:
                    self.peak, self._at_peak = held, sorted(self._running.copy())  # tests go on meanwhile


def processes() -> Iterator[psutil.Process]:
    """This process and all below it."""
    this = psutil.Process()
    yield from (this, *this.children(recursive=True))


def processor_seconds() -> Iterator[float]:
    """Seconds of each process, with those of its children that have ended."""
    for process in processes():
        with suppress(psutil.Error):
            yield sum(process.cpu_times()[:4])


def resident() -> Iterator[int]:
    """Bytes of each process; a page that several share counts for each of them."""
    for process in processes():
        with suppress(psutil.Error):
            yield process.memory_info().rss


def own_share() -> Iterator[int]:
    """Bytes of each process; of a page that several share, its part. Elsewhere than on Linux: of its own pages only."""
    for process in processes():
        with suppress(psutil.Error):
            memory = process.memory_full_info()
            yield getattr(memory, "pss", memory.uss)
