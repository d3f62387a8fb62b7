"""What `dev.py test` runs: ruff, mypy, the gates of tools/gates.py, then pytest."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tools import gates
from tools.testhost import ROOT, say

PACK = "koala_pack"
SHIPPED = ("koala", "koala_reader", "koala_loader", "koala_saver", "transfer", "speed", "nodes")
PROCESSES = 2  # of pytest
SLOWEST = 25  # tests that are listed at the end
LARGE = 4 << 20
"""Bytes from which glibc gives an allocation back as soon as it is freed. Left to itself it raises this to 32 MB, and
of a model that is gone it keeps gigabytes."""
CONFIG = str(ROOT / "pyproject.toml")


def run(pytest_arguments: Sequence[str], everything: bool = False) -> int:
    """Run the checks, then the tests; stops at the first that fails and returns its exit status.

    Without ``everything`` the tests marked nightly are left out. The last line of output is pytest's summary, if it
    comes to that.
    """
    use = Use()
    for title, check in (
        ("ruff check", lint),
        ("ruff format", formatting),
        ("mypy", types),
        ("the packed pack", gates.run),
    ):
        say(f"== {title}")
        if status := check():
            say(f"== {title} failed; the tests were not run")
            return status
    say("== pytest")
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // PROCESSES)))
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(LARGE))
    return pytest.main([*arguments(everything), *pytest_arguments], plugins=[use])


def arguments(everything: bool) -> list[str]:
    """pytest's, before those that one gives oneself."""
    # tests/conftest.py says what stays together, and in which order it is handed out
    sharing = [f"--numprocesses={PROCESSES}", "--dist=loadscope", "--no-loadscope-reorder"]
    return [*sharing, f"--durations={SLOWEST}", *([] if everything else ["-m", "not nightly"])]


class Use:
    """Time and memory that all of it takes, this process and every one below it, told above pytest's summary."""

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
        terminalreporter.write_line(f"time: {minutes:.1f} minutes, of processors {sum(computed()) / 60:.1f}")
        terminalreporter.write_line(f"peak memory: {self.peak / 1e9:.1f} GB")

    def _look(self) -> None:
        """How much of their pages processes share takes long to find out. It is done where they may hold more than ever
        (their sum, with shared pages in it once for each, is never too low) and not the same as a moment ago."""
        seen = 0
        while not self._over.wait(self.EVERY):
            now = sum(resident())
            if now > self.peak and abs(now - seen) > 0.01 * seen:
                seen, self.peak = now, max(self.peak, sum(own_share()))


def processes() -> Iterator[psutil.Process]:
    this = psutil.Process()
    yield from (this, *this.children(recursive=True))


def computed() -> Iterator[float]:
    """Seconds of each process, with those of its children that are gone."""
    for process in processes():
        with suppress(psutil.Error):
            yield sum(process.cpu_times()[:4])


def resident() -> Iterator[int]:
    for process in processes():
        with suppress(psutil.Error):
            yield process.memory_info().rss


def own_share() -> Iterator[int]:
    """Bytes of each process; of a page that several share, its part. Elsewhere than on Linux: of its own pages only."""
    for process in processes():
        with suppress(psutil.Error):
            found = process.memory_full_info()
            yield getattr(found, "pss", found.uss)


def lint() -> int:
    return subprocess.call([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT)


def formatting() -> int:
    return subprocess.call([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT)


def types() -> int:
    """Type-check what ships, then the tools.

    The pack's relative imports make sense only in a package, which the checkout is under any name: a link gives it one.
    """
    cache = ["--config-file", CONFIG, "--cache-dir", str(ROOT / ".mypy_cache")]
    with tempfile.TemporaryDirectory(prefix="koala-mypy-") as temporary:
        os.symlink(ROOT, Path(temporary) / PACK, target_is_directory=True)
        modules = [option for name in SHIPPED for option in ("-p", f"{PACK}.{name}")]
        shipped = subprocess.call([sys.executable, "-m", "mypy", *cache, *modules], cwd=temporary)
    tools = subprocess.call([sys.executable, "-m", "mypy", *cache, "tools", "dev.py"], cwd=ROOT)
    return shipped or tools
