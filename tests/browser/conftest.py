"""A browser for all of these tests, and the canvas in either renderer, on a server that has files to choose from.

Screenshots go to the folder that KOALA_SCREENSHOTS names, else to a temporary one that is kept where a test failed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from safetensors.torch import save_file

from tools.harness import browser
from tools.harness.client import Client
from tools.harness.errors import UserError
from tools.harness.server import Server, running
from tools.harness.testhost import Host
from tools.synthetic import adapters

FILES = (
    "diffusion_models/koala-700m.fp16.safetensors",
    "diffusion_models/koala-lightning-700m.fp16.safetensors",
    "checkpoints/sd_xl_base_1.0.safetensors",
)
"""Model files that the canvas is to offer; nobody reads them here, so they are empty."""


@pytest.fixture(scope="session")
def chromium(shared: ExitStack) -> Browser:
    """The machine's browser; where there is none and none can be installed, these tests are left out, and say so."""
    try:
        browser.chromium()
    except UserError as problem:
        pytest.skip(str(problem))
    return shared.enter_context(browser.browser())


@pytest.fixture(scope="session")
def server(host: Host, shared: ExitStack) -> Server:
    """A server of these tests' own: its model files are empty, and no other test should come upon them."""
    return shared.enter_context(running(host))


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    """A connection to that server."""
    return Client(server.url)


@pytest.fixture(scope="session")
def files(server: Server) -> None:
    """The empty model files, and a small LoRA for koala-tiny."""
    for name in FILES:
        path = server.base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    lora = server.base / "models" / "loras" / "small.safetensors"
    lora.parent.mkdir(parents=True, exist_ok=True)
    save_file(adapters.lora(adapters.SMALL_SDXL, only=adapters.in_attention), lora)


@pytest.fixture(params=[False, True], ids=["classic", "nodes2"])
def nodes_2(request: pytest.FixtureRequest) -> bool:
    """Which renderer: the classic canvas, or Nodes 2.0."""
    return bool(request.param)


@pytest.fixture
def page(chromium: Browser, server: Server, files: None, nodes_2: bool) -> Iterator[Page]:
    """The empty canvas; a test fails where the page had something to complain of our script."""
    with browser.canvas(chromium, server.url, nodes_2) as opened:
        yield opened
        assert opened.complaints == []  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = os.environ.get("KOALA_SCREENSHOTS")
    return Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")


@pytest.fixture
def shoot(page: Page, shots: Path, nodes_2: bool) -> Callable[[str], Any]:
    """Keep a screenshot under a name."""
    return lambda name: browser.screenshot(page, shots, f"{name}-{'nodes2' if nodes_2 else 'classic'}")
