"""What a person sees and does on the real canvas, in the classic renderer and in Nodes 2.0."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Browser, Page

from koala_sdxl.koala.schedule import schedule
from tests.browser.canvas import Shoot, Shots, add, click_title, connect, in_both_renderers, overlaps, workflow
from tools.generate.workflows import FOLDER, name_of
from tools.harness import browser
from tools.harness.client import Client
from tools.harness.server import Server
from tools.harness.testhost import ROOT

WORKFLOWS = sorted(name_of(path.stem) for path in FOLDER.glob("*.json"))
NODES = sorted(
    found for path in (ROOT / "nodes").glob("*.py") for found in re.findall(r'node_id="(\w+)"', path.read_text("utf-8"))
)
some_by_day = pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.nightly)])
"""For a test of all nodes, or all templates: by day of one in so many."""


# --- find ---------------------------------------------------------------------------------------------------------


@some_by_day
def test_each_node_is_found_by_search_and_put_on_the_canvas(
    every: int, page: Page, shoot: Shoot, client: Client
) -> None:
    schemas = client.object_info()
    for node in NODES[::every]:
        page.evaluate("() => window.app.rootGraph.clear()")
        page.evaluate("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        box = page.get_by_role("dialog").locator("input").first
        box.wait_for()
        box.fill(schemas[node]["display_name"])
        page.get_by_role("option", selected=True).filter(has_text=schemas[node]["display_name"]).wait_for()
        if node == NODES[0]:
            shoot("search")
        page.keyboard.press("Enter")
        page.get_by_role("dialog").wait_for(state="hidden")
        page.mouse.click(800, 500)
        assert [found["type"] for found in browser.nodes(page)] == [node]


def test_a_node_is_found_by_what_one_would_call_it(page: Page) -> None:
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = page.get_by_role("dialog").locator("input").first
    box.wait_for()
    for words, title in (("sdxl lite", "KOALA"), ("25 steps", "KOALA"), ("swap sdxl", "KOALA U-Net Swap")):
        box.fill(words)
        page.wait_for_timeout(700)
        assert title in page.get_by_role("dialog").inner_text(), words


# --- run ----------------------------------------------------------------------------------------------------------


def test_koala_tiny_draws_from_the_canvas_and_its_picture_brings_the_graph_back(
    page: Page, shoot: Shoot, server: Server
) -> None:
    browser.open_workflow(page, workflow("KOALA-tiny text to image"))
    browser.run(page)
    browser.see_all(page)
    shoot("koala-tiny")
    assert page.evaluate("() => window.koalaDone") == "execution_success"
    told = page.locator(".koala-text").all_inner_texts()
    assert any(
        "25 steps, cfg 7.5, leading, euler\nThese are the published settings of koala-tiny base. " in text
        for text in told
    )
    assert "nothing was cut" in told
    before = browser.nodes(page)
    name = page.evaluate(
        "() => Object.values(window.app.nodeOutputs).map((output) => output.images?.[0].filename).find(Boolean)"
    )
    picture = (server.base / "output" / name).read_bytes()
    page.evaluate("() => window.app.rootGraph.clear()")
    page.evaluate(
        """async ([name, bytes]) => {
            const file = new File([new Uint8Array(bytes)], name, { type: 'image/png' });
            await window.app.handleFile(file);
        }""",
        [name, list(picture)],
    )
    page.wait_for_timeout(800)
    assert [node["type"] for node in browser.nodes(page)] == [node["type"] for node in before]
    browser.run(page)
    assert page.evaluate("() => window.koalaDone") == "execution_success"


@in_both_renderers
def test_curve_bars_and_badge_are_drawn_with_the_right_numbers(page: Page, shoot: Shoot, nodes_2: bool) -> None:
    loader = add(page, "KoalaCheckpointLoader")
    scheduler = add(page, "KoalaScheduler", steps=12)
    lora = add(page, "KoalaLoraLoader", lora_name="small.safetensors")
    for source, output, target, name in (
        (loader, 0, scheduler, "model"),
        (loader, 0, lora, "model"),
        (loader, 1, lora, "clip"),
    ):
        connect(page, source, output, target, name)
    for source, output in ((scheduler, 0), (lora, 2)):
        connect(page, source, output, add(page, "PreviewAny"), "source")
    browser.run(page)
    browser.see_all(page)
    shoot("curve-and-bars")
    assert overlaps(page) == []
    dots = page.locator(".koala-curve circle")
    dots.first.wait_for(state="attached")
    sigmas = [float(dots.nth(step).get_attribute("data-sigma") or "") for step in range(dots.count())]
    assert sigmas == schedule(12, "leading").sigmas.tolist()
    assert "published: 25 steps, cfg 7.5, leading" in (page.locator(".koala-curve").text_content() or "")
    counts = page.evaluate(
        """() => { const counts = (bar) => [...bar.children].map((part) => [part.dataset.outcome, +part.dataset.count]);
            const bars = [...document.querySelectorAll('.koala-bar')];
            return Object.fromEntries(bars.map((bar) => [bar.dataset.stage, Object.fromEntries(counts(bar))])); }"""
    )
    assert counts == {
        "down 2": {"applied": 22, "removed": 22},
        "down 3": {"applied": 52, "removed": 152},
        "middle": {"removed": 102},
        "up 1": {"applied": 104, "removed": 202},
        "up 2": {"applied": 44, "removed": 22},
    }
    if nodes_2:
        page.get_by_text("koala-tiny base · 8M · 0.3 % of SDXL").wait_for()
    else:  # drawn on the canvas
        shown = "(id) => window.app.rootGraph.getNodeById(id).badges.map((badge) => badge.text)"
        assert "koala-tiny base · 8M · 0.3 % of SDXL" in page.evaluate(shown, loader)
    # what is shown is no value of the node: it is not saved
    saved = page.evaluate("(id) => window.app.rootGraph.getNodeById(id).serialize().widgets_values", lora)
    assert saved == ["small.safetensors", 1, 1, "auto", 0]


@pytest.mark.nightly
def test_a_second_page_is_shown_what_comes_from_the_cache(
    page: Page, chromium: Browser, server: Server, nodes_2: bool
) -> None:
    """The same graph again: nothing is computed, and the nodes still say what they said."""
    saved = workflow("KOALA-tiny text to image")
    for node in saved["nodes"]:
        if node["type"] == "KoalaSampler":
            node["widgets_values"][1] = "fixed"
    browser.open_workflow(page, saved)
    browser.run(page)
    with browser.canvas(chromium, server.url, nodes_2) as other:
        browser.open_workflow(other, saved)
        browser.run(other)
        assert sorted(other.locator(".koala-text").all_inner_texts()) == sorted(
            page.locator(".koala-text").all_inner_texts()
        )


def test_a_cancelled_run_can_be_run_again(page: Page) -> None:
    saved = workflow("KOALA-tiny text to image")
    for node in saved["nodes"]:
        if node["type"] == "EmptyLatentImage":
            node["widgets_values"] = [512, 512, 4]
    browser.open_workflow(page, saved)
    page.evaluate(
        """async () => { window.koalaDone = false; const api = window.app.api;
            for (const name of ['execution_success', 'execution_error', 'execution_interrupted'])
                api.addEventListener(name, () => { window.koalaDone = name }, { once: true });
            api.addEventListener('progress', () => api.interrupt(), { once: true });
            await window.app.queuePrompt(0, 1); }"""
    )
    page.wait_for_function("() => window.koalaDone")
    assert page.evaluate("() => window.koalaDone") == "execution_interrupted"
    page.evaluate(
        """() => { const latent = window.app.rootGraph.nodes.find((node) => node.type === 'EmptyLatentImage');
            latent.widgets.forEach((widget, at) => { widget.value = [128, 128, 1][at] }); }"""
    )
    browser.run(page)
    assert page.evaluate("() => window.koalaDone") == "execution_success"


def test_an_error_is_read_in_the_error_panel(page: Page, shoot: Shoot) -> None:
    loader = add(page, "KoalaCheckpointLoader")
    page.evaluate(
        """(id) => { const node = window.app.rootGraph.getNodeById(id); const source = node.widgets[0];
            source.value = 'U-Net + SDXL checkpoint'; source.callback?.(source.value);
            node.widgets.find(({ name }) => name.endsWith('unet_name')).value = 'koala-700m.fp16.safetensors'; }""",
        loader,
    )
    connect(page, loader, 0, add(page, "KoalaModelInfo"), "model")
    browser.run(page)
    assert page.evaluate("() => window.koalaDone") == "execution_error"
    page.get_by_role("button", name="View details").click()
    message = page.get_by_text("koala-700m.fp16.safetensors is empty; expected a .safetensors file of KOALA weights")
    message.first.wait_for()
    shoot("error")


# --- templates and help --------------------------------------------------------------------------------------------


@some_by_day
def test_each_template_opens_with_its_values(every: int, page: Page, shoot: Shoot) -> None:
    for title in WORKFLOWS[::every]:
        saved = workflow(title)
        browser.open_workflow(page, saved)
        shoot(f"template {title}")
        page.keyboard.press("Escape")  # the dialog about missing files, where there is one
        found = {int(node["id"]): node for node in browser.nodes(page)}
        assert {number: node["type"] for number, node in found.items()} == {
            node["id"]: node["type"] for node in saved["nodes"]
        }
        for node in saved["nodes"]:
            if node["type"].startswith("Koala"):
                shown = list(found[node["id"]]["widgets"].values())
                assert shown[: len(node["widgets_values"])] == node["widgets_values"], (title, node["type"])


@some_by_day
def test_the_help_page_of_each_node_is_shown(every: int, page: Page, shoot: Shoot) -> None:
    for node in NODES[::every]:
        page.evaluate("() => window.app.rootGraph.clear()")
        add(page, node)
        page.wait_for_timeout(300)
        click_title(page, node)
        if page.get_by_test_id("info-button").count():
            page.get_by_test_id("info-button").click()
        first = (ROOT / "web" / "docs" / f"{node}.md").read_text("utf-8").split("\n## ")[1].splitlines()[0]
        title = (ROOT / "web" / "docs" / f"{node}.md").read_text("utf-8").splitlines()[0].removeprefix("# ")
        page.get_by_role("heading", name=title).last.wait_for()
        page.get_by_role("heading", name=first).last.wait_for()
        wait_for_picture(page, node)
        if node == "KoalaSampler":
            shoot("help")


def wait_for_picture(page: Page, node: str) -> None:
    """Until the picture of a help page that is open has been loaded."""
    page.wait_for_function(
        "(node) => [...document.images].some((image) => image.src.endsWith(`${node}.png`) && image.naturalWidth > 100)",
        arg=node,
    )


@pytest.mark.nightly
def test_korean_is_shown(chromium: Browser, server: Server, files: None, nodes_2: bool, shots: Shots) -> None:
    with browser.canvas(chromium, server.url, nodes_2, locale="ko") as page:
        browser.open_workflow(page, workflow("KOALA-tiny text to image"))
        shots(page, f"korean-{'nodes2' if nodes_2 else 'classic'}")
        titles = page.evaluate("() => window.app.rootGraph.nodes.map((node) => node.title)")
        korean = json.loads((ROOT / "locales" / "ko" / "nodeDefs.json").read_text("utf-8"))
        assert korean["KoalaSampler"]["display_name"] in titles
        click_title(page, "KoalaSampler")
        page.get_by_test_id("info-button").click()
        page.get_by_role("heading", name=korean["KoalaSampler"]["display_name"]).last.wait_for()
        wait_for_picture(page, "KoalaSampler")
        shots(page, f"korean-help-{'nodes2' if nodes_2 else 'classic'}")
