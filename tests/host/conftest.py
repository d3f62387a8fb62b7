"""One real ComfyUI server, with the packed pack in it, for all of these tests.

It keeps no model for the tests after it: full-size ones fill the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tools.harness.client import Client
from tools.harness.server import Server, running
from tools.harness.testhost import Host


@pytest.fixture(scope="session")
def server(host: Host, shared: ExitStack) -> Server:
    """The running server; put models below ``server.base / "models"``, it sees them at the next request."""
    return shared.enter_context(running(host, arguments=["--preview-method", "latent2rgb"]))


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    """A connection to the server."""
    return Client(server.url)


@pytest.fixture(scope="session")
def object_info(client: Client) -> dict[str, object]:
    """The schema of every node that the server has."""
    return client.object_info()


@pytest.fixture(scope="module", autouse=True)
def _models_are_let_go(client: Client) -> Iterator[None]:
    yield
    client.free()
