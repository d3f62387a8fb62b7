"""The real canvas in a real browser: Chromium without a window, driven by Playwright, on a running ComfyUI.

The browser is the machine's own (nothing is downloaded by Playwright). Debian and Ubuntu have it as `chromium`; where
it is absent and the process may install packages, as on a fresh CI machine, it is installed with apt-get.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from playwright.sync_api import Browser, Page, sync_playwright

from tools.harness.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--force-device-scale-factor=1"),
)
SIZE = (1600, 1000)
PATIENCE = 120_000  # milliseconds, for a machine that is busy with other things
READY = "() => window.app?.extensionManager?.workflow?.activeWorkflow && window.app.canvas && window.LiteGraph"
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.Graph.CanvasInfo": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # texts are drawn however small they are
}
OURS = ("koala-sdxl/", "koalasdxl", "[DEPRECATED] Monkey-patching")
"""What is in a line of the browser's console that our script has caused."""


def chromium() -> str:
    """Path of a Chromium or Chrome. Raises UserError where there is none and none can be installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        for command in (
            ["apt-get", "-q", "update"],
            ["apt-get", "-qy", "install", "--no-install-recommends", NAMES[0]],
        ):
            subprocess.run(command, check=False, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        found = shutil.which(NAMES[0])
    if found is None:
        raise UserError(
            "No Chromium or Chrome found for the browser tests. On Debian and Ubuntu: apt install chromium."
        )
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A running browser without a window."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        try:
            yield started
        finally:
            started.close()


@contextmanager
def canvas(browser: Browser, url: str, nodes_2: bool, locale: str = "en") -> Iterator[Page]:
    """ComfyUI's canvas, empty, in the classic renderer or in Nodes 2.0.

    What the page's own script of the pack complains of ends up in ``page.complaints``.
    """
    settings = {**SETTINGS, "Comfy.VueNodes.Enabled": nodes_2, "Comfy.Locale": locale}
    requests.post(f"{url}/api/settings", json=settings, timeout=30).raise_for_status()
    context = browser.new_context(viewport={"width": SIZE[0], "height": SIZE[1]}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    complaints: list[str] = []
    page.complaints = complaints  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if _ours(line) else None)
    try:
        page.goto(url)
        page.wait_for_function(READY)
        page.evaluate("() => window.app.rootGraph.clear()")
        yield page
    finally:
        context.close()


def _ours(line: Any) -> bool:
    return line.type in ("error", "warning") and any(word in line.text for word in OURS)


def open_workflow(page: Page, workflow: dict[str, Any]) -> None:
    """Open a workflow, as dropping its file does, and let all of it be seen."""
    page.evaluate("async (saved) => { await window.app.loadGraphData(saved) }", workflow)
    see_all(page)


def see_all(page: Page) -> None:
    """Fit the view to the graph, near enough for texts to be drawn."""
    page.evaluate("() => window.app.canvas.deselectAll()")  # else the view is fitted to what is selected
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(600)


def nodes(page: Page) -> list[dict[str, Any]]:
    """Every node of the graph: id, type, its widgets' values by name, and the nodes that its inputs come from."""
    found: list[dict[str, Any]] = page.evaluate(
        """() => window.app.rootGraph.nodes.map((node) => ({
            id: node.id,
            type: node.type,
            widgets: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value])),
            inputs: Object.fromEntries(
                (node.inputs ?? []).map((input, slot) => [input.name, node.getInputNode(slot)?.id])),
        }))"""
    )
    return found


def run(page: Page) -> None:
    """Queue the graph as the Run button does and wait for its end."""
    page.evaluate(
        """() => { window.koalaDone = false;
            for (const name of ['execution_success', 'execution_error', 'execution_interrupted'])
                window.app.api.addEventListener(name, () => { window.koalaDone = name }, { once: true }); }"""
    )
    page.evaluate("async () => { await window.app.queuePrompt(0, 1) }")
    page.wait_for_function("() => window.koalaDone")
    page.wait_for_timeout(500)


def screenshot(page: Page, folder: Path, name: str) -> Path:
    """A picture of the whole page."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    page.screenshot(path=str(path))
    return path
