"""The swap on other canvases: the newest one, and those that older ComfyUI releases came with."""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.cases import CASES
from tests.browser.conftest import place_files
from tests.browser.test_swap import require_swap
from tests.small_sdxl import nodes_of_tests
from tools.harness import browser, testhost
from tools.harness.server import running
from tools.harness.testhost import RELEASES, TESTED_RELEASE, Host, pinned_host

PACKAGE = "comfyui-frontend-package"
NEWEST = "1.58.1"
CANVASES = {
    f"newest canvas, {NEWEST}": (TESTED_RELEASE, NEWEST),
    **{f"ComfyUI {release}": (release, "") for release in RELEASES if release != TESTED_RELEASE},
}
"""Release and its canvas; "" for the one that its requirements name."""
pytestmark = [pytest.mark.nightly, pytest.mark.slow]  # a server and a download for each; by day the tested one alone


def static_files(host: Host, version: str) -> Path:
    """The folder with a version of the canvas, fetched from PyPI if need be."""
    if not version:
        required = (host.folder / "requirements.txt").read_text("utf-8")
        version = re.search(rf"^{PACKAGE}==(\S+)", required, re.MULTILINE)[1]  # type: ignore[index]
    folder = testhost.cache_folder() / f"canvas-{version}"
    with testhost.locked(folder) as lock:
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix="canvas-", dir=folder.parent) as name:
                temporary = Path(name)
                fetch = ["download", "--no-deps", "--dest", name, f"{PACKAGE}=={version}"]
                testhost.pip(host.python, fetch, temporary, lock)
                (wheel,) = temporary.glob("*.whl")
                zipfile.ZipFile(wheel).extractall(temporary / "unpacked")
                os.rename(temporary / "unpacked" / PACKAGE.replace("-", "_") / "static", folder)
    return folder


@pytest.fixture(scope="module", params=CANVASES)
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    release, version = CANVASES[request.param]
    host = pinned_host(release)
    arguments = ["--front-end-root", str(static_files(host, version))]
    folders = {"custom_nodes": [nodes_of_tests(tmp_path_factory)]}
    with running(host, model_folders=folders, arguments=arguments) as server:
        place_files(server)
        yield server.url


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes2"])
def other_canvas(request: pytest.FixtureRequest, chromium: Browser, address: str) -> Iterator[Page]:
    with browser.canvas(chromium, address, request.param) as page:
        said: list[str] = []
        page.on("console", lambda line: said.append(line.text))
        yield page
        assert page.complaints == []  # type: ignore[attr-defined]
        assert [line for line in said if re.search(r"\b(input\.link|output\.links) is deprecated", line)] == []


@pytest.mark.parametrize("name", CASES)
def test_a_swap_on_another_canvas(name: str, other_canvas: Page) -> None:
    require_swap(other_canvas, CASES[name], name)
