"""The server that these tests share keeps no model for the tests after it: full-size ones fill the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.client import Client


@pytest.fixture(scope="module", autouse=True)
def _models_are_let_go(client: Client) -> Iterator[None]:
    yield
    client.free()
