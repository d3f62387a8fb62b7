"""These tests call ComfyUI and the pack (as ``koala_sdxl``) in their own process: see tools/harness/inprocess.py."""

import pytest

from tests import large
from tools.harness import inprocess

inprocess.activate()
as_nodes_run = pytest.fixture(scope="module", autouse=True)(inprocess.as_nodes_run)
enough_memory = pytest.fixture(scope="module", autouse=True)(large.enough_memory)
