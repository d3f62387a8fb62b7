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

    def __init__(self) -> None:
        self.peak = 0
        self._begun = time.monotonic()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        self._over.set()
        self._watch.join()
        minutes = (time.monotonic() - self._begun) / 60
        terminalreporter.write_line(f"time: {minutes:.1f} minutes, of processors {sum(processor_seconds()) / 60:.1f}")
        terminalreporter.write_line(f"peak memory: {self.peak / 1e9:.1f} GB")

    def _look(self) -> None:
        """How much of their pages processes share takes long to find out. It is done where they may hold more than ever
        (their sum, which counts a shared page once for each, is never too low) and not the same as a moment ago."""
        seen = 0
        while not self._over.wait(self.EVERY):
            now = sum(resident())
            if now > self.peak and abs(now - seen) > 0.01 * seen:
                seen, self.peak = now, max(self.peak, sum(own_share()))


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
