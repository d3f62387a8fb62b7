"""On the canvas: templates with their pictures, missing files, the blueprint, workflows of older versions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from tests.browser.canvas import Shoot, Shots
from tests.browser.graphs import LORA, UNET
from tests.host.test_example_workflows import SWAP, shortened
from tests.host.test_nodes import seen
from tests.host.test_old_workflows import SAVED, lost, queued, read
from tests.host.test_transfer_nodes import Stock, number, require_stock_graph
from tools.generate.frozen import opened
from tools.generate.thumbnails import SIDE
from tools.generate.workflows import models, workflows
from tools.harness import browser
from tools.harness.client import Client
from tools.harness.server import Server
from tools.harness.workflow import to_prompt

PUBLISHED = "03 KOALA-700M text to image (25 steps)"
TINY = "01 KOALA-tiny text to image"
BLUEPRINT, TINY_BLUEPRINT = "KOALA text to image", "KOALA-tiny text to image"
SHOWN = {"positive", "negative", "width", "height", "seed"}


@pytest.fixture
def classic(chromium: Browser, server: Server) -> Iterator[Page]:
    """The empty canvas in one renderer, where it makes no difference which; downloads go nowhere."""
    with browser.canvas(chromium, server.url, nodes_2=False) as page:
        page.context.route(re.compile("^https://"), lambda route: route.abort())
        yield page
        assert page.complaints == []  # type: ignore[attr-defined]


@pytest.fixture
def bare(server: Server) -> Iterator[list[dict[str, str]]]:
    """The files of the published workflow, none of them on the server; what other tests have put there comes back."""
    wanted = models(workflows()[PUBLISHED])
    aside = {}
    for model in wanted:
        path = server.base / "models" / model["directory"] / model["name"]
        if path.exists():
            aside[path] = path.rename(path.with_name(f"{path.name}.aside"))
    yield wanted
    for path, kept in aside.items():
        kept.rename(path)


# --- templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.nightly)])
def test_templates_are_listed_with_their_pictures(every: int, classic: Page, shots: Shots) -> None:
    """By day every fourth is looked at."""
    titles = list(workflows())
    classic.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = classic.get_by_role("dialog")
    dialog.locator("input").first.fill("KOALA")
    dialog.get_by_text(f"Showing {len(titles)} of").wait_for()
    sizes = "(all) => Object.fromEntries(all.map((i) => [i.alt, [i.naturalWidth, i.naturalHeight]]))"
    found: dict[str, list[int]] = {}
    for title in titles[::every]:
        dialog.get_by_text(title, exact=True).first.scroll_into_view_if_needed()
        dialog.get_by_role("img", name=title, exact=True).wait_for()  # loaded where it can be seen only
        classic.wait_for_function("() => [...document.querySelectorAll('[role=dialog] img')].every((i) => i.complete)")
        found |= dialog.locator("img").evaluate_all(sizes)
    shots(classic, "templates")
    # the host's own picture, for a template that has none, is smaller
    assert {title: found[title] for title in titles[::every]} == {title: [SIDE, SIDE] for title in titles[::every]}
    assert found.keys() <= set(titles)


def test_missing_files_are_named_with_folder_and_download(
    classic: Page, bare: list[dict[str, str]], shots: Shots
) -> None:
    classic.evaluate("() => window.app.refreshComboInNodes()")
    browser.open_workflow(classic, workflows()[PUBLISHED])
    classic.get_by_role("button", name="View details").click()
    rows = classic.get_by_test_id("missing-model-importable-rows")
    rows.wait_for()
    shots(classic, "missing-models")
    lines = rows.inner_text().split("\n")
    named = {tuple(lines[at : at + 2]) for at in range(0, len(lines), 3)}
    assert named == {(model["name"], model["directory"]) for model in bare}
    # where a click would lead: the host makes a link and clicks it
    classic.evaluate(
        """() => { window.koalaLinks = {};
            HTMLAnchorElement.prototype.click = function () { window.koalaLinks[this.download] = this.href; }; }"""
    )
    for model in bare:
        rows.get_by_role("button", name=f"Download {model['name']}").click()
    classic.wait_for_function("(count) => Object.keys(window.koalaLinks).length === count", arg=len(bare))
    assert classic.evaluate("() => window.koalaLinks") == {model["name"]: model["url"] for model in bare}


def test_what_needs_no_download_opens_with_every_file_there(classic: Page) -> None:
    opened_titles = []
    for title, workflow in workflows().items():
        if models(workflow):
            continue
        browser.open_workflow(classic, workflow)
        strays = classic.evaluate(
            """() => window.app.rootGraph.nodes.flatMap((node) => (node.widgets ?? [])
                .filter((widget) => widget.type === 'combo')
                .filter((widget) => { const { values } = widget.options;
                    return !(typeof values === 'function' ? values(widget, node) : values).includes(widget.value); })
                .map((widget) => [node.type, widget.name, widget.value]))"""
        )
        assert strays == [], title
        assert classic.get_by_role("button", name="View details").count() == 0, title
        opened_titles.append(title)
    assert len(opened_titles) == 5


def test_an_exported_graph_is_run_by_the_client(classic: Page, client: Client) -> None:
    browser.open_workflow(classic, workflows()[TINY])
    _, prompt = opened(classic)
    assert len(client.run(prompt).images()) == 1


def test_the_sdxl_template_draws_on_a_small_sdxl(files: None, client: Client) -> None:
    """With and without the swap, a LoRA before it and behind it; SDXL's own sizes: tests/host/test_transfer_nodes.py"""
    info = client.object_info()
    graph = to_prompt(shortened(read(SWAP), info), info)
    graph[loader := number(graph, "CheckpointLoaderSimple")] = {"class_type": "TinySDXL", "inputs": {}}
    graph[number(graph, "KoalaUNetSwap")]["inputs"]["unet_name"] = UNET
    require_stock_graph(Stock(client, graph, loader, LORA))


# --- blueprint ----------------------------------------------------------------------------------------------------


def place(page: Page, shoot: Shoot, title: str) -> dict[str, Any]:
    """Put a blueprint on the canvas by the search box; returns its node."""
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = page.get_by_role("dialog").locator("input").first
    box.wait_for()
    box.fill(title)
    page.get_by_role("option", selected=True).filter(has_text=title).wait_for()
    shoot(f"search {title}")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for(state="hidden")
    page.mouse.click(700, 300)
    page.wait_for_timeout(600)
    (placed,) = browser.nodes(page)
    return placed


def test_the_model_is_chosen_on_the_blueprint(page: Page, shoot: Shoot) -> None:
    placed = place(page, shoot, BLUEPRINT)
    lightning = models(workflows()["02 KOALA-Lightning text to image (10 steps)"])
    assert [value for name, value in placed["widgets"].items() if name.startswith("source.")] == [
        model["name"] for model in lightning
    ]
    assert {"positive", "negative", "width", "height", "seed"} <= placed["widgets"].keys()
    browser.see_all(page)
    shoot("blueprint with files")
    page.evaluate(
        """() => { const [root] = window.app.rootGraph.nodes;
            const widget = root.widgets.find((known) => known.name === 'source.unet_name');
            widget.value = 'koala-700m.fp16.safetensors';
            widget.callback?.(widget.value); }"""
    )
    _, prompt = opened(page)
    (loader,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "KoalaCheckpointLoader"]
    files = {name.removeprefix("source."): value for name, value in loader.items() if name.startswith("source.")}
    assert loader["source"] == "U-Net + text encoders + VAE"
    assert files == {
        "unet_name": "koala-700m.fp16.safetensors",
        "clip_name1": "koala-clip-l.fp16.safetensors",
        "clip_name2": "koala-clip-g.fp16.safetensors",
        "vae_name": "koala-vae.safetensors",
    }


def test_the_blueprint_is_found_shows_its_widgets_and_draws(
    page: Page, shoot: Shoot, nodes_2: bool, server: Server
) -> None:
    placed = place(page, shoot, TINY_BLUEPRINT)
    assert placed["widgets"] == {
        "positive": "a gray koala on a green background",
        "negative": "",
        "width": 128,
        "height": 128,
        "seed": 0,
    }
    if nodes_2:
        text = page.locator(f'[data-node-id="{placed["id"]}"]').inner_text()
        assert TINY_BLUEPRINT in text
        assert all(name in text for name in SHOWN)
    page.evaluate(
        """() => { const [root] = window.app.rootGraph.nodes;
            const values = { positive: 'a red circle on a white background', width: 96, seed: 7 };
            for (const [name, value] of Object.entries(values))
                root.widgets.find((widget) => widget.name === name).value = value;
            const save = LiteGraph.createNode('SaveImage');
            save.pos = [root.pos[0] + root.size[0] + 80, root.pos[1]];
            window.app.rootGraph.add(save);
            root.connect(0, save, 0); }"""
    )
    _, prompt = opened(page)
    inputs = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert inputs["KoalaPrompt"]["positive"] == "a red circle on a white background"
    assert (inputs["EmptyLatentImage"]["width"], inputs["EmptyLatentImage"]["height"]) == (96, 128)
    assert (inputs["KoalaSampler"]["seed"], inputs["KoalaSampler"]["preset"]) == (7, "auto")
    browser.run(page)
    assert page.evaluate("() => window.koalaDone") == "execution_success"
    browser.see_all(page)
    shoot("blueprint")
    (name,) = page.evaluate(
        "() => Object.values(window.app.nodeOutputs).flatMap((output) => output.images ?? []).map((i) => i.filename)"
    )
    picture = Image.open(server.base / "output" / name)
    assert picture.size == (96, 128)
    assert seen(picture) == ("red", "circle", "white")
    # what is not shown outside is chosen inside
    page.evaluate(
        """() => { const [root] = window.app.rootGraph.nodes;
            const sampler = root.subgraph.nodes.find((node) => node.type === 'KoalaSampler');
            for (const [name, value] of [['preset', 'custom'], ['preset.steps', 3]]) {
                const widget = sampler.widgets.find((known) => known.name === name);
                widget.value = value;
                widget.callback?.(value);
            } }"""
    )
    _, prompt = opened(page)
    (inputs,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "KoalaSampler"]
    assert (inputs["preset"], inputs["preset.steps"]) == ("custom", 3)
    browser.run(page)
    assert page.evaluate("() => window.koalaDone") == "execution_success"


# --- workflows of older versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("title", ["every node", pytest.param("", marks=pytest.mark.nightly)])
def test_what_older_versions_saved_opens_with_every_value(title: str, classic: Page) -> None:
    """By day the graphs with every node; tests/host/test_old_workflows.py gives the server all there are."""
    for path in (path for path in SAVED if path.stem.startswith(title)):
        before = read(path)
        browser.open_workflow(classic, before)
        classic.keyboard.press("Escape")
        saved, prompt = opened(classic)
        assert lost(queued(path), prompt) == {}, path
        now = {node["id"]: node for node in saved["nodes"]}
        for node in before["nodes"]:
            values = node.get("widgets_values", [])
            assert now[node["id"]]["widgets_values"][: len(values)] == values, (path, node["type"])
