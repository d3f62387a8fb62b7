"""These tests call ComfyUI and the pack (as ``koala_pack``) in their own process: see tools/inprocess.py."""

import pytest

from tests import large
from tools import inprocess

inprocess.activate()
as_nodes_run = pytest.fixture(scope="module", autouse=True)(inprocess.as_nodes_run)
enough_memory = pytest.fixture(scope="module", autouse=True)(large.enough_memory)
