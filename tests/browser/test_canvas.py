"""What a person sees and does on the real canvas, in the classic renderer and in Nodes 2.0."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Browser, Page

from koala.schedule import schedule
from koala.settings import BASE, LIGHTNING
from tools import browser
from tools.client import Client
from tools.server import Server
from tools.testhost import ROOT

FOLDER = ROOT / "example_workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
NODES = sorted(
    found for path in (ROOT / "nodes").glob("*.py") for found in re.findall(r'node_id="(\w+)"', path.read_text("utf-8"))
)
Shoot = Callable[[str], Any]
SWAP = "Swap U-Net for KOALA"


def workflow(title: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{title}.json").read_text("utf-8"))
    return loaded


def without_swap() -> dict[str, Any]:
    """The shipped SDXL graph as it was before the swap, with SDXL's usual settings."""
    saved = workflow("KOALA-700M in an SDXL graph")
    by_type = {node["type"]: node for node in saved["nodes"]}
    loader, swap, sampler = (by_type[kind] for kind in ("CheckpointLoaderSimple", "KoalaUNetSwap", "KSampler"))
    into, out = (next(link for link in saved["links"] if swap["id"] == link[end]) for end in (3, 1))
    out[1:3] = [loader["id"], 0]
    saved["links"].remove(into)
    saved["nodes"].remove(swap)
    loader["outputs"][0]["links"] = [out[0]]
    assert out[3] == sampler["id"]
    sampler["widgets_values"][2:6] = [30, 6.0, "dpmpp_2m", "karras"]
    return saved


def one(page: Page, kind: str) -> dict[str, Any]:
    (found,) = [node for node in browser.nodes(page) if node["type"] == kind]
    return found


# --- find ---------------------------------------------------------------------------------------------------------


def test_each_node_is_found_by_search_and_put_on_the_canvas(page: Page, shoot: Shoot, client: Client) -> None:
    schemas = client.object_info()
    for node in NODES:
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
    assert any("25 steps, cfg 7.5, leading, euler\nauto: koala-tiny, base: metadata" in text for text in told)
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


def add(page: Page, kind: str, **values: Any) -> int:
    """Put a node on the canvas and set its widgets; returns its id."""
    number: int = page.evaluate(
        """([kind, values]) => {
            const node = LiteGraph.createNode(kind);
            const nodes = window.app.rootGraph.nodes;
            node.pos = [nodes.length ? Math.max(...nodes.map((known) => known.pos[0] + known.size[0])) + 60 : 200, 200];
            window.app.rootGraph.add(node);
            for (const [name, value] of Object.entries(values)) {
                const widget = node.widgets.find((known) => known.name === name);
                widget.value = value;
                widget.callback?.(value);
            }
            return node.id; }""",
        [kind, values],
    )
    return number


def connect(page: Page, source: int, output: int, target: int, name: str) -> None:
    page.evaluate(
        """([source, output, target, name]) => { const graph = window.app.rootGraph;
            graph.getNodeById(source).connect(output, graph.getNodeById(target), name); }""",
        [source, output, target, name],
    )


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
            source.value = 'U-Net + SDXL checkpoint'; source.callback?.(source.value); }""",
        loader,
    )
    connect(page, loader, 0, add(page, "KoalaModelInfo"), "model")
    browser.run(page)
    assert page.evaluate("() => window.koalaDone") == "execution_error"
    page.get_by_role("button", name="View details").click()
    message = page.get_by_text("koala-700m.fp16.safetensors is empty; expected a .safetensors file of KOALA weights")
    message.first.wait_for()
    shoot("error")


# --- swap ---------------------------------------------------------------------------------------------------------


def overlaps(page: Page) -> list[list[str]]:
    """Pairs of nodes that stand on each other."""
    found: list[list[str]] = page.evaluate(
        """() => { const nodes = window.app.rootGraph.nodes; const on = (a, b) =>
                a.pos[0] < b.pos[0] + b.size[0] && b.pos[0] < a.pos[0] + a.size[0] &&
                a.pos[1] - 30 < b.pos[1] + b.size[1] && b.pos[1] - 30 < a.pos[1] + a.size[1];
            const others = (a, at) => nodes.slice(at + 1).filter((b) => on(a, b));
            return nodes.flatMap((a, at) => others(a, at).map((b) => [a.type, b.type])); }"""
    )
    return found


def start_history(page: Page) -> None:
    """What is on the canvas now is what undo comes back to."""
    page.evaluate(
        """() => { const tracker = window.app.extensionManager.workflow.activeWorkflow.changeTracker;
            tracker.checkState(); tracker.reset(); tracker.undoQueue.length = 0; }"""
    )


def undo(page: Page, key: str = "z") -> None:
    page.evaluate(
        "(redo) => window.app.extensionManager.command.execute(redo ? 'Comfy.Redo' : 'Comfy.Undo')", key != "z"
    )
    page.wait_for_timeout(700)


def test_swap_from_the_nodes_menu_undo_redo(page: Page, shoot: Shoot) -> None:
    browser.open_workflow(page, without_swap())
    start_history(page)
    before = browser.nodes(page)
    click_title(page, "KSampler", button="right")
    assert page.get_by_text(SWAP, exact=True).count() == 0
    page.keyboard.press("Escape")
    click_title(page, "CheckpointLoaderSimple", button="right")
    shoot("swap-menu")
    page.get_by_text(SWAP, exact=True).last.click()
    page.wait_for_timeout(700)
    browser.see_all(page)
    shoot("swapped")
    swapped = browser.nodes(page)
    swap, sampler = one(page, "KoalaUNetSwap"), one(page, "KSampler")
    assert overlaps(page) == []
    assert swap["inputs"]["model"] == one(page, "CheckpointLoaderSimple")["id"]
    assert sampler["inputs"]["model"] == swap["id"]
    assert swap["widgets"]["unet_name"] == "koala-700m.fp16.safetensors"
    base = BASE.settings
    assert [sampler["widgets"][name] for name in ("steps", "cfg", "sampler_name", "scheduler")] == [
        base.steps, base.cfg, "euler", "ddim_uniform",
    ]  # fmt: skip
    others = {"KoalaUNetSwap", "KSampler"}
    assert [node for node in swapped if node["type"] not in others] == [
        node for node in before if node["type"] not in others
    ]
    undo(page)
    assert browser.nodes(page) == before
    undo(page, "y")
    assert {node["type"] for node in browser.nodes(page)} == {node["type"] for node in swapped}
    assert one(page, "KSampler")["widgets"]["scheduler"] == "ddim_uniform"


def click_title(page: Page, kind: str, button: Any = "left") -> None:
    """Click a node's title."""
    x, y = page.evaluate(
        """(kind) => { const node = window.app.rootGraph.nodes.find((known) => known.type === kind);
            return window.app.canvasPosToClientPos([node.pos[0] + 60, node.pos[1] - 12]); }""",
        kind,
    )
    page.mouse.click(x, y, button=button)
    page.wait_for_timeout(600)


def test_swap_by_the_selections_toolbox(page: Page, shoot: Shoot) -> None:
    browser.open_workflow(page, without_swap())
    click_title(page, "KSampler")
    assert page.get_by_role("button", name=SWAP).count() == 0
    click_title(page, "CheckpointLoaderSimple")
    shoot("swap-toolbox")
    page.get_by_role("button", name=SWAP).click()
    page.wait_for_timeout(500)
    assert one(page, "KSampler")["inputs"]["model"] == one(page, "KoalaUNetSwap")["id"]
    # a second time there is nothing left to swap, and that is said
    page.evaluate("() => window.app.extensionManager.command.execute('KOALA.SwapUNet')")
    page.get_by_text("has KOALA U-Net Swap behind it").wait_for()
    assert len([node for node in browser.nodes(page) if node["type"] == "KoalaUNetSwap"]) == 1


def test_lightnings_settings_come_with_its_file(client: Client, files: None) -> None:
    inputs = client.object_info()["KoalaUNetSwap"]["input"]["required"]
    published = inputs["unet_name"][1]["koala_published"]
    fast = LIGHTNING.settings
    wanted = {"steps": fast.steps, "cfg": fast.cfg, "sampler_name": "euler", "scheduler": "simple"}
    assert published["koala-lightning-700m.fp16.safetensors"] == wanted


def test_a_text_to_image_graph_is_inserted_and_runs(page: Page, shoot: Shoot) -> None:
    start_history(page)
    page.evaluate("() => window.app.extensionManager.command.execute('KOALA.InsertTextToImage')")
    page.wait_for_function("() => window.app.rootGraph.nodes.length > 5")
    page.wait_for_timeout(500)
    types = [node["type"] for node in workflow("KOALA-tiny text to image")["nodes"]]
    assert [node["type"] for node in browser.nodes(page)] == types
    undo(page)
    assert browser.nodes(page) == []
    undo(page, "y")
    browser.see_all(page)
    shoot("inserted")
    browser.run(page)
    assert page.evaluate("() => window.koalaDone") == "execution_success"


# --- templates and help --------------------------------------------------------------------------------------------


def test_each_template_opens_with_its_values(page: Page, shoot: Shoot) -> None:
    for title in WORKFLOWS:
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


def test_the_help_page_of_each_node_is_shown(page: Page, shoot: Shoot) -> None:
    for node in NODES:
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


def test_korean_is_shown(chromium: Browser, server: Server, files: None, nodes_2: bool, shots: Any) -> None:
    with browser.canvas(chromium, server.url, nodes_2, locale="ko") as page:
        browser.open_workflow(page, workflow("KOALA-tiny text to image"))
        browser.screenshot(page, shots, f"korean-{'nodes2' if nodes_2 else 'classic'}")
        titles = page.evaluate("() => window.app.rootGraph.nodes.map((node) => node.title)")
        korean = json.loads((ROOT / "locales" / "ko" / "nodeDefs.json").read_text("utf-8"))
        assert korean["KoalaSampler"]["display_name"] in titles
        click_title(page, "KoalaSampler")
        page.get_by_test_id("info-button").click()
        page.get_by_role("heading", name=korean["KoalaSampler"]["display_name"]).last.wait_for()
        wait_for_picture(page, "KoalaSampler")
        browser.screenshot(page, shots, f"korean-help-{'nodes2' if nodes_2 else 'classic'}")
