"""One real ComfyUI server, with the packed pack in it, for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tools.harness.client import Client
from tools.harness.server import Server, running
from tools.harness.testhost import Host


@pytest.fixture(scope="session")
def server(host: Host, shared: ExitStack) -> Server:
    """The running server; put models below ``server.base / "models"``, it sees them at the next request.

    From a megabyte on glibc gives what is freed back to the system. By itself it comes to do so from 32 MB on only, and
    keeps gigabytes of models that are gone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
        return shared.enter_context(running(host, arguments=["--preview-method", "latent2rgb"]))


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    """A connection to the server."""
    return Client(server.url)


@pytest.fixture(scope="session")
def object_info(client: Client) -> dict[str, object]:
    """The schema of every node that the server has."""
    return client.object_info()


@pytest.fixture
def full_size(full_size: None, client: Client) -> Iterator[None]:
    """For a test with a full-size model, here or in the server."""
    yield
    client.free()  # it does so between two graphs: when a second one has begun, it has done it
    for width in (8, 16):
        image = {"class_type": "EmptyImage", "inputs": {"width": width, "height": 8, "batch_size": 1, "color": 0}}
        client.run({"1": image, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
