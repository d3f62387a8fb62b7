"""What a server says of its nodes; nothing else here needs one."""

from __future__ import annotations

import pytest

from tools.harness.client import Client
from tools.harness.server import running
from tools.harness.testhost import Host


@pytest.fixture(scope="session")
def object_info(host: Host) -> dict[str, object]:
    """The schema of every node that a server with the pack has."""
    with running(host) as server:
        return Client(server.url).object_info()
