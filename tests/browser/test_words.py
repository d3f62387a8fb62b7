"""What nodes show after a run: in the language of the canvas, and legible in each of the host's themes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.canvas import Shots, add, connect, workflow
from tools.generate.locales import MESSAGES, read
from tools.harness import browser
from tools.harness.server import Server

HANGUL = re.compile("[가-힣]")
LEGIBLE = 4.5
"""Contrast of text that WCAG 2 asks for, level AA."""
THEMES = ("dark", "light", "solarized", "arc", "nord", "github")
"""The host's own colour palettes."""

MEASURE = """() => {
    const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const pixel = (colour) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => {
        const [red, green, blue] = pixel(colour).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const behind = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const onCanvas = each.classList.contains('koala-content') && !LiteGraph.vueNodesMode;
            if (onCanvas) return LiteGraph.NODE_DEFAULT_BGCOLOR;
            const colour = getComputedStyle(each).backgroundColor;
            if (pixel(colour)[3] === 255) return colour;
        }
    };
    const contrast = (one, other) => {
        const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
    const found = [];
    for (const element of document.querySelectorAll('.koala-content, .koala-content *')) {
        const style = getComputedStyle(element);
        if (element.namespaceURI.endsWith('svg') && element.tagName === 'title') continue;
        const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const drawn = { text: style.fill, circle: style.fill, polyline: style.stroke }[element.tagName];
        const ours = drawn ?? (text || element.classList.contains('koala-swatch') ? style.color : undefined);
        if (ours) found.push([element.textContent || element.tagName, contrast(ours, behind(element)), +style.opacity]);
    }
    return found;
}"""
"""[what, contrast with what is behind it, opacity] of every text, line, dot and piece of a bar that our nodes show."""


LOOK_AT = """(id) => {
    const [x, y] = window.app.rootGraph.getNodeById(id).pos, { canvas } = window.app;
    canvas.ds.scale = 1;
    canvas.ds.offset[0] = 200 - x;
    canvas.ds.offset[1] = 200 - y;
    canvas.setDirty(true, true);
}"""


@dataclass(frozen=True)
class Shown:
    """A canvas in Korean with nodes that have run. ``nodes_2``: the renderer."""

    page: Page
    nodes_2: bool
    loader: int
    scheduler: int
    shots: Shots

    def shoot(self, name: str) -> None:
        """Keep a screenshot of the scheduler and the LoRA loader, in their full size."""
        self.page.evaluate(LOOK_AT, self.scheduler)
        self.page.wait_for_timeout(400)
        self.shots(self.page, f"{name}-{'nodes2' if self.nodes_2 else 'classic'}")
        browser.see_all(self.page)


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.nightly)], ids=["classic", "nodes2"]
)
def shown(
    request: pytest.FixtureRequest, chromium: Browser, server: Server, files: None, shots: Shots
) -> Iterator[Shown]:
    with browser.canvas(chromium, server.url, request.param, locale="ko") as page:
        saved = workflow("KOALA-tiny text to image")
        browser.open_workflow(page, saved)
        (loader,) = (node["id"] for node in saved["nodes"] if node["type"] == "KoalaCheckpointLoader")
        scheduler = add(page, "KoalaScheduler", steps=12)
        lora = add(page, "KoalaLoraLoader", lora_name="small.safetensors")
        for output, target, name in (
            (0, scheduler, "model"),
            (0, lora, "model"),
            (1, lora, "clip"),
        ):
            connect(page, loader, output, target, name)
        for source, output in ((scheduler, 0), (lora, 2)):
            connect(page, source, output, add(page, "PreviewAny"), "source")
        browser.run(page)
        browser.see_all(page)
        yield Shown(page, request.param, loader, scheduler, shots)
        assert page.complaints == []  # type: ignore[attr-defined]


def korean() -> dict[str, str]:
    """English template -> Korean."""
    found: dict[str, str] = read("ko")["main"][MESSAGES]
    return found


def test_what_nodes_show_is_korean(shown: Shown) -> None:
    page, said = shown.page, korean()
    assert page.evaluate("() => window.koalaDone") == "execution_success"
    shown.shoot("korean")
    told = page.locator(".koala-text").all_inner_texts()
    assert len(told) == 4  # Model Info, prompt, sampler, LoRA
    key, value = "koala.variant", "base"
    evidence = said['Its metadata says so: {key} is "{value}".'].format(key=key, value=value)
    settings = said["{steps} steps, cfg {cfg}, {spacing}"].format(steps=25, cfg=7.5, spacing="leading")
    why = said["These are the published settings of {model} {variant}. {evidence}"]
    assert f"{settings}, euler\n{why.format(model='koala-tiny', variant='base', evidence=evidence)}" in told
    assert said["nothing was cut"] in told
    lines = [line for text in told for line in text.split("\n") if line != "small.safetensors"]
    assert [line for line in lines if not HANGUL.search(line)] == []
    titles = page.locator(".koala-curve > text").all_text_contents()[:2]
    twelve = said["{steps} steps, {spacing}"].format(steps=12, spacing="leading")
    assert titles == [
        said["sigmas: {schedule}"].format(schedule=twelve),
        said["published: {schedule}"].format(schedule=settings),
    ]
    bars = page.locator(".koala-coverage").inner_text()
    assert said["applied"] in bars
    assert said["removed with KOALA's missing layers"] in bars
    assert page.evaluate("(id) => window.app.rootGraph.getNodeById(id).size[1]", shown.scheduler) < 400
    if shown.nodes_2:
        badges = page.locator(".koala-badge").all_inner_texts()
    else:  # drawn on the canvas
        of_node = "(id) => window.app.rootGraph.getNodeById(id).badges.map((badge) => badge.text)"
        badges = page.evaluate(of_node, shown.loader)
    assert "koala-tiny base · 8M · SDXL의 0.3 %" in badges


def test_a_toast_is_korean(shown: Shown) -> None:
    page = shown.page
    page.evaluate("() => { window.app.canvas.deselectAll() }")
    page.evaluate("() => window.app.extensionManager.command.execute('KOALA.SwapUNet')")
    page.get_by_text(korean()["Select a node with a MODEL output first, such as Load Checkpoint."]).wait_for()


def test_everything_that_nodes_show_is_legible_in_every_theme(shown: Shown) -> None:
    page = shown.page
    faint = []
    try:
        for theme in THEMES:
            page.evaluate("(id) => window.app.extensionManager.setting.set('Comfy.ColorPalette', id)", theme)
            page.wait_for_timeout(500)
            if theme == "light":
                shown.shoot("light")
            measured = page.evaluate(MEASURE)
            assert len(measured) > 40
            faint += [(theme, *found) for found in measured if found[1] < LEGIBLE or found[2] < 1]
    finally:
        page.evaluate("() => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    assert faint == []
