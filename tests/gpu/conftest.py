"""Tests on an NVIDIA GPU, by themselves: ``python -m pytest tests/gpu``. Elsewhere they are skipped, and say why.

With a ComfyUI of one's own, by the Python that runs them: ``KOALA_BENCH_COMFYUI=DIR python -m pytest tests/gpu``. It
needs what the benchmark needs there (tools/measure/bench), pytest, pytest-xdist, coverage and psutil.

ComfyUI runs on one device for as long as a process lives: in one that has it on the CPU, as all other tests do, these
are skipped, too. They are the CPU's tests of tests/speed once more, and what only a GPU can show.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import pytest
import torch

from tests import large
from tools.harness import inprocess
from tools.harness.client import Client
from tools.harness.server import Server
from tools.harness.testhost import Host
from tools.measure.bench import engines, served


def _why_not() -> str:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU here"
    if "comfy.model_management" in sys.modules:
        return "ComfyUI is on the CPU in this process: run tests/gpu by itself"
    return ""


WHY_NOT = _why_not()
engines.activate("cpu" if WHY_NOT else "cuda")
from comfy import model_management  # noqa: E402 - there once it is activated

FREE_MEMORY = model_management.get_free_memory
as_nodes_run = pytest.fixture(scope="module", autouse=True)(inprocess.as_nodes_run)
enough_memory = pytest.fixture(scope="module", autouse=True)(large.enough_memory)


@pytest.fixture
def real_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI finds as much free memory as there is, in spite of ``enough_memory``."""
    monkeypatch.setattr(model_management, "get_free_memory", FREE_MEMORY)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if WHY_NOT:
        pytest.skip(WHY_NOT)


@pytest.fixture(scope="session")
def server(host: Host, shared: ExitStack) -> Server:
    """ComfyUI on the GPU, with dynamic VRAM where it has it, as people run it."""
    return shared.enter_context(served.with_checkout(host))


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    """A connection to the server."""
    return Client(server.url)
