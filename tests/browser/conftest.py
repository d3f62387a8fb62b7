"""A browser for all of these tests, and the canvas in either renderer, on a server that has files to choose from.

Screenshots are made where KOALA_SCREENSHOTS names a folder for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from safetensors.torch import load_file, save_file

from koala_sdxl.koala.files.conventions import UNET_PREFIX
from tests.browser import graphs
from tests.browser.canvas import Shoot, Shots
from tests.small_sdxl import nodes_of_tests
from tools.harness import browser
from tools.harness.client import Client
from tools.harness.errors import UserError
from tools.harness.server import Server, running
from tools.harness.testhost import ROOT, Host
from tools.synthetic import adapters

ASSETS = ROOT / "assets"
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
def server(host: Host, shared: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server of these tests' own: it has nodes of theirs, its model files are empty, and no other test should come
    upon them."""
    return shared.enter_context(running(host, model_folders={"custom_nodes": [nodes_of_tests(tmp_path_factory)]}))


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    """A connection to that server."""
    return Client(server.url)


@pytest.fixture(scope="session")
def files(server: Server) -> None:
    """The empty model files; koala-tiny's U-Net, its LoRA and its ControlNet in files of their own; a small LoRA."""
    place_files(server)


def place_files(server: Server) -> None:
    """Put those files below a server's models/."""
    for name in FILES:
        path = server.base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    models = server.base / "models"
    for folder, name in (("loras", graphs.LORA), ("controlnet", graphs.CONTROLNET)):
        (models / folder).mkdir(parents=True, exist_ok=True)
        (models / folder / name).symlink_to(ASSETS / f"koala-{name}")
    save_file(adapters.lora(adapters.SMALL_SDXL, only=adapters.in_attention), models / "loras" / "small.safetensors")
    tiny = load_file(ASSETS / "koala-tiny.safetensors")
    unet = {key.removeprefix(UNET_PREFIX): tensor for key, tensor in tiny.items() if key.startswith(UNET_PREFIX)}
    save_file(unet, models / "diffusion_models" / graphs.UNET)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.nightly)], ids=["classic", "nodes2"])
def nodes_2(request: pytest.FixtureRequest) -> bool:
    """Which renderer: the classic canvas, or Nodes 2.0; by day the latter in tests with ``in_both_renderers`` alone."""
    return bool(request.param)


@pytest.fixture
def page(chromium: Browser, server: Server, files: None, nodes_2: bool) -> Iterator[Page]:
    """The empty canvas; a test fails where the page had something to complain of our script."""
    with browser.canvas(chromium, server.url, nodes_2) as opened:
        yield opened
        assert opened.complaints == []  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def shots() -> Shots:
    """Keep a page's screenshot under a name, for who has named a folder: each takes a second."""
    folder = os.environ.get("KOALA_SCREENSHOTS")
    return lambda page, name: folder and browser.screenshot(page, Path(folder), name)


@pytest.fixture
def shoot(page: Page, shots: Shots, nodes_2: bool) -> Shoot:
    """The same of the test's page, its renderer in the name."""
    return lambda name: shots(page, f"{name}-{'nodes2' if nodes_2 else 'classic'}")
