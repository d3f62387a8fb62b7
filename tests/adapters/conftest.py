"""These tests let the real libraries write adapters, and call ComfyUI and the pack in their own process."""

import logging

import pytest

from tests import large
from tools.harness import inprocess

inprocess.activate()
enough_memory = pytest.fixture(scope="module", autouse=True)(large.enough_memory)

logging.getLogger("LyCORIS").setLevel(logging.WARNING)
