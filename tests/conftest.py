"""The real ComfyUI, and what the tests of a folder share: each folder that needs a server has its own.

Tests under unit/ ask for none, and need neither ComfyUI nor the environment's other half.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from typing import Any

import coverage
import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import large
from tools.harness import testhost

SHARED = pytest.StashKey[ExitStack]()
"""What the tests of a folder share and what takes memory: servers, a browser."""
SERVED = ("browser", "host")
"""Folders whose tests share a server; everywhere else a file shares nothing with others."""
SHARING = {
    **dict.fromkeys(
        (f"parity/test_{name}.py" for name in ("loader", "loading", "parity", "save", "saver_full_size")),
        "full-size",
    ),
    **dict.fromkeys((f"dev/test_{name}.py" for name in ("command_lines", "gates", "reliability")), "schemas"),
}
"""Files that stay together -> by which name: those of parity/ that have full-size models, one at a time, as in two
processes they would wait for each other; and those that ask a server for its nodes' schemas."""
UNMEASURED: tuple[str, ...] = ("adapters/", "browser/", "tiny/")
UNMEASURED += tuple(f"dev/test_{tool}" for tool in ("bench", "carry", "distill", "gates", "killed", "lineage", "study"))
UNMEASURED += tuple(f"speed/test_accelerate.py::test_{what}" for what in ("every", "presets"))
"""How tests begin, below tests/, whose coverage is not measured: it makes Python much slower, up to three times, and
what these tests run of the pack is run by others, too."""
LONGEST = (
    "host",
    "speed/test_accelerate.py",
    "speed/test_execution.py",
    "browser",
    "dev/test_distill.py",
    "dev/test_distill_processes.py",
    "schemas",
    "dev/test_distill_teachers.py",
    "dev/test_distill_ways.py",
    "adapters/test_kinds.py",
    "dev/test_killed.py",
    "dev/test_bench_report.py",
    "dev/test_bench.py",
    "parity/test_saver.py",
    "tiny/test_fidelity.py",
    "full-size",
    "parity/test_transfer.py",
)
"""What takes longest, in about that order: neither what has a browser nor full-size models beside the host's server."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SHARED] = ExitStack()
    signal.signal(signal.SIGTERM, _end)


def _end(*_: Any) -> None:
    """A run that is told to end, by CI's time limit say, takes its processes along, and the servers of those."""
    for child in psutil.Process().children():
        child.terminate()
    pytest.exit("terminated", returncode=143)


class Together(LoadScopeScheduling):
    """Of the two processes of `dev.py test` one gets all tests of a file, or of a folder that has a server."""

    def _split_scope(self, nodeid: str) -> str:
        return together(nodeid)


def together(nodeid: str) -> str:
    """What a test stays together with, in a word or the path of its file below tests/."""
    path = nodeid.split("::")[0].removeprefix("tests/")
    folder = path.split("/")[0]
    return folder if folder in SERVED else SHARING.get(path, path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever takes longest comes first, so that both processes end at about the same time."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(together(item.nodeid), len(rank)))
    large = {together(item.nodeid) for item in items if "full_size" in getattr(item, "fixturenames", ())}
    if strays := large - {"full-size", "host"}:
        raise pytest.UsageError(f"{', '.join(sorted(strays))}: a full-size model outside of those in {__file__}")


def pytest_collection_finish() -> None:
    """All that was imported stays: a collection that looks through it each time takes a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Neither this process nor those that a test starts are measured where UNMEASURED says so."""
    measured = coverage.Coverage.current()
    if measured is None or not item.nodeid.removeprefix("tests/").startswith(UNMEASURED):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_START", raising=False)
        measured.stop()
        try:
            return (yield)
        finally:
            measured.start()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What is shared ends with the folder's last test, and freed memory goes back with a file's: others need it."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        item.config.stash[SHARED].close()
    if nextitem is None or nextitem.path != item.path:
        large.let_go()


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config) -> ExitStack:
    """Keeps what is entered into it until the folder's last test."""
    return pytestconfig.stash[SHARED]


@pytest.fixture(scope="session")
def host() -> testhost.Host:
    """The pinned ComfyUI and its Python."""
    return testhost.test_host()


@pytest.fixture
def full_size() -> Iterator[None]:
    """For a test with a full-size model."""
    with large.alone():
        yield


@pytest.fixture
def several_processes() -> Iterator[None]:
    """For a test that starts several with PyTorch: together they hold what a full-size model does, so none beside."""
    with large.alone():
        yield
