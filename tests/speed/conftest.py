"""These tests call ComfyUI and the pack (as ``koala_sdxl``) in their own process: see tools/harness/inprocess.py."""

from collections.abc import Iterator

import pytest

from tests import large, shared_models
from tools.harness import inprocess

inprocess.activate()
as_nodes_run = pytest.fixture(scope="module", autouse=True)(inprocess.as_nodes_run)
enough_memory = pytest.fixture(scope="module", autouse=True)(large.enough_memory)


@pytest.fixture(scope="module", autouse=True)
def own_models(as_nodes_run: None) -> Iterator[None]:
    """koala-tiny, for this file alone."""
    yield from shared_models.of_this_file()
