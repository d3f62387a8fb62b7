"""One real ComfyUI server, with the packed pack in it, for every test that asks for it.

Tests under unit/ ask for none, and need neither ComfyUI nor the environment's other half.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tools import testhost
from tools.client import Client
from tools.server import Server, running


def pytest_configure() -> None:
    """A run that is told to end, by CI's time limit say, ends in order: its servers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


@pytest.fixture(scope="session")
def host() -> testhost.Host:
    """The pinned ComfyUI and its Python."""
    return testhost.test_host()


@pytest.fixture(scope="session")
def server(host: testhost.Host) -> Iterator[Server]:
    """The running server; put models below ``server.base / "models"``, it sees them at the next request."""
    with running(host, arguments=["--preview-method", "latent2rgb"]) as started:
        yield started


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    """A connection to the server."""
    return Client(server.url)


@pytest.fixture(scope="session")
def object_info(client: Client) -> dict[str, object]:
    """The schema of every node that the server has."""
    return client.object_info()
