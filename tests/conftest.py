"""The real ComfyUI, and what the tests of a folder share: each folder that needs a server has its own.

Tests under unit/ ask for none, and need neither ComfyUI nor the environment's other half.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack

import pytest

from tools import testhost

SHARED = pytest.StashKey[ExitStack]()
"""What the tests of a folder share and what takes memory: servers, a browser."""
FULL_SIZE = ("host", "parity")
"""Folders whose tests take up to 13 GB."""


def pytest_configure(config: pytest.Config) -> None:
    """A run that is told to end, by CI's time limit say, ends in order: its servers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))
    config.stash[SHARED] = ExitStack()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`dev.py test` has two processes: a folder is for one of them, and so are both folders with full-size models."""
    for item in items:
        folder = item.path.relative_to(config.rootpath / "tests").parts[0]
        item.add_marker(pytest.mark.xdist_group("full-size" if folder in FULL_SIZE else folder))


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
