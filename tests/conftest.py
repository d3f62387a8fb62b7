"""The real ComfyUI, and what the tests of a folder share: each folder that needs a server has its own.

Tests under unit/ ask for none, and need neither ComfyUI nor the environment's other half.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

from tools.harness import testhost

SHARED = pytest.StashKey[ExitStack]()
"""What the tests of a folder share and what takes memory: servers, a browser."""
FULL_SIZE = ("host", "parity")
"""Folders whose tests take up to 13 GB."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SHARED] = ExitStack()
    signal.signal(signal.SIGTERM, _end)


def _end(*_: Any) -> None:
    """A run that is told to end, by CI's time limit say, takes its processes along, and the servers of those."""
    for child in psutil.Process().children():
        child.terminate()
    pytest.exit("terminated", returncode=143)


class ByFolder(LoadScopeScheduling):
    """`dev.py test` has two processes: a folder is for one of them, and so are both folders with full-size models."""

    def _split_scope(self, nodeid: str) -> str:
        folder = nodeid.split("/")[1]
        return "full-size" if folder in FULL_SIZE else folder


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFolder:
    """xdist's own ways of sharing tests out know of files, not of folders."""
    return ByFolder(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What is shared ends with the folder's last test: full-size models in a server and in this process at once are
    more than 24 GB."""
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
