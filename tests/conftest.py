"""The real ComfyUI, and what the tests of a folder share: each folder that needs a server has its own.

Tests under unit/ ask for none, and need neither ComfyUI nor the environment's other half.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import large
from tools.harness import testhost

SHARED = pytest.StashKey[ExitStack]()
"""What the tests of a folder share and what takes memory: servers, a browser."""
SERVED = ("browser", "host")
"""Folders whose tests share a server; everywhere else a file shares nothing with others."""
FULL_SIZE = ("test_loader.py", "test_loading.py", "test_parity.py", "test_save.py", "test_saver_full_size.py")
"""Files of parity/ that have full-size models, one at a time: in two processes they would wait for each other."""
LONGEST = (
    "host",
    "dev/test_distill.py",
    "dev/test_distill_ways.py",
    "browser",
    "speed/test_accelerate.py",
    "speed/test_execution.py",
    "full-size",
    "adapters/test_kinds.py",
    "dev/test_bench.py",
    "dev/test_gates.py",
    "parity/test_transfer.py",
    "tiny/test_fidelity.py",
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
    folder, name = nodeid.split("::")[0].split("/", 2)[1:]
    if folder == "parity" and name in FULL_SIZE:
        return "full-size"
    return folder if folder in SERVED else f"{folder}/{name}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever takes longest comes first, so that both processes end at about the same time."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(together(item.nodeid), len(rank)))
    large = {together(item.nodeid) for item in items if "full_size" in getattr(item, "fixturenames", ())}
    if strays := large - {"full-size", "host"}:
        raise pytest.UsageError(f"{', '.join(sorted(strays))}: a full-size model outside of FULL_SIZE in {__file__}")


def pytest_collection_finish() -> None:
    """All that was imported stays: a collection that looks through it each time takes a second."""
    gc.collect()
    gc.freeze()


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
