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
LONGEST = (
    "speed/test_accelerate.py",
    "speed/test_cpu_routines.py",
    "browser",
    "host",
    "dev/test_distill.py",
    "dev/test_distill_ways.py",
    "tiny/test_fidelity.py",
    "parity/test_saver.py",
    "parity/test_saver_full_size.py",
)
"""What takes longest, in that order."""


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
    """What a test stays together with."""
    file = nodeid.split("::")[0]
    folder = file.split("/")[1]
    return folder if folder in SERVED else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever takes longest comes first, so that both processes end at about the same time."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(together(item.nodeid).removeprefix("tests/"), len(rank)))


def pytest_collection_finish() -> None:
    """All that was imported stays: a collection that looks through it each time takes a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What is shared ends with the folder's last test: it takes memory."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        item.config.stash[SHARED].close()


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
