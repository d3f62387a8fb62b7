"""The pack's two commands on the real canvas: swap a U-Net for KOALA, insert a text-to-image graph."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page

from koala_sdxl.koala.releases import BASE, LIGHTNING, Settings
from tests.browser.canvas import Shoot, add, click_title, connect, overlaps, swap_command, workflow
from tests.browser.conftest import FILES
from tests.browser.graphs import UNET
from tools.harness import browser
from tools.harness.client import Client
from tools.harness.server import Server

SWAP = "Swap U-Net for KOALA"


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


def widgets(published: Settings, scheduler: str) -> dict[str, Any]:
    """KSampler's, as a model was published."""
    return {"steps": published.steps, "cfg": published.cfg, "sampler_name": "euler", "scheduler": scheduler}


BASE_WIDGETS, LIGHTNING_WIDGETS = widgets(BASE.settings, "ddim_uniform"), widgets(LIGHTNING.settings, "simple")


def settings(page: Page) -> list[Any]:
    """The sampler's, in the order of BASE_WIDGETS."""
    values = one(page, "KSampler")["widgets"]
    return [values[name] for name in BASE_WIDGETS]


def command(page: Page, kind: str | None) -> list[str]:
    """Select a node and give the command to swap; returns what is said."""
    selected = (
        "(kind) => window.app.canvas.selectItems(window.app.rootGraph.nodes.filter((node) => node.type === kind))"
    )
    page.evaluate("() => window.app.canvas.deselectAll()")
    page.evaluate(selected, kind)
    return swap_command(page)


def choose(page: Page, nodes_2: bool, file: str) -> None:
    """Choose a file in KOALA U-Net Swap with the mouse, as a person does."""
    name = file.rsplit("/")[-1]
    browser.see_all(page)
    if nodes_2:
        node = page.locator(f'[data-node-id="{one(page, "KoalaUNetSwap")["id"]}"]')
        node.get_by_test_id("widget-select-default-trigger").first.click()
        page.get_by_test_id("widget-select-default-overlay").get_by_text(name).click()
    else:
        x, y = page.evaluate(
            """() => { const node = window.app.rootGraph.nodes.find((known) => known.type === 'KoalaUNetSwap');
                const widget = node.widgets.find((known) => known.name === 'unet_name');
                return window.app.canvasPosToClientPos(
                    [node.pos[0] + node.size[0] / 2, node.pos[1] + (widget.last_y ?? widget.y) + 10]); }"""
        )
        page.mouse.click(x, y)
        page.locator(".litemenu-entry", has_text=name).click()
    page.wait_for_timeout(500)


def one(page: Page, kind: str) -> dict[str, Any]:
    (found,) = [node for node in browser.nodes(page) if node["type"] == kind]
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
    assert swap["widgets"]["unet_name"] == UNET
    assert settings(page) == [*BASE_WIDGETS.values()]
    others = {"KoalaUNetSwap", "KSampler"}
    assert [node for node in swapped if node["type"] not in others] == [
        node for node in before if node["type"] not in others
    ]
    undo(page)
    assert browser.nodes(page) == before
    undo(page, "y")
    assert {node["type"] for node in browser.nodes(page)} == {node["type"] for node in swapped}
    assert one(page, "KSampler")["widgets"]["scheduler"] == "ddim_uniform"


@pytest.mark.nightly
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
    page.get_by_text("is already followed by KOALA U-Net Swap").wait_for()
    assert len([node for node in browser.nodes(page) if node["type"] == "KoalaUNetSwap"]) == 1


def test_what_cannot_be_swapped_is_said(page: Page) -> None:
    """Nothing selected, a node without a MODEL, a MODEL that goes nowhere, and KOALA's own."""
    browser.open_workflow(page, workflow("KOALA-tiny text to image"))
    nothing = "Select a node with a MODEL output first, such as Load Checkpoint."
    for kind in (None, "KoalaSampler", "KoalaCheckpointLoader"):
        assert command(page, kind) == [nothing]
    add(page, "CheckpointLoaderSimple")
    title = "Load Checkpoint"
    assert command(page, "CheckpointLoaderSimple") == [
        f'The MODEL output of "{title}" is not connected. Connect it first.'
    ]
    patch = add(page, "RescaleCFG")
    loader, sampler = (one(page, kind)["id"] for kind in ("KoalaCheckpointLoader", "KoalaSampler"))
    connect(page, loader, 0, patch, "model")
    connect(page, patch, 0, sampler, "model")
    assert command(page, "RescaleCFG") == ['"RescaleCFG" has a KOALA model already.']
    assert "KoalaUNetSwap" not in {node["type"] for node in browser.nodes(page)}


def test_another_file_sets_the_samplers_again_but_for_what_a_person_has_set(
    page: Page, nodes_2: bool, shoot: Shoot
) -> None:
    browser.open_workflow(page, without_swap())
    command(page, "CheckpointLoaderSimple")
    page.wait_for_timeout(500)
    start_history(page)
    before = browser.nodes(page)
    assert settings(page) == [*BASE_WIDGETS.values()]
    choose(page, nodes_2, FILES[1])
    assert settings(page) == [*LIGHTNING_WIDGETS.values()]
    shoot("lightning")
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_timeout(700)
    assert browser.nodes(page) == before
    page.evaluate(
        """() => { const sampler = window.app.rootGraph.nodes.find((node) => node.type === 'KSampler');
            sampler.widgets.find((widget) => widget.name === 'steps').value = 40; }"""
    )
    choose(page, nodes_2, FILES[1])
    assert settings(page) == [40, *[*LIGHTNING_WIDGETS.values()][1:]]
    page.get_by_text('not set: "KSampler": steps, because it is 40, not what was set before').wait_for()


def test_a_file_that_comes_later_sets_the_samplers(page: Page, nodes_2: bool, server: Server) -> None:
    """The U-Nets come while the canvas is open: R lists them."""
    folder = server.base / "models" / "diffusion_models"
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()
    try:
        page.evaluate("() => window.app.refreshComboInNodes()")
        browser.open_workflow(page, without_swap())
        said = command(page, "CheckpointLoaderSimple")
        assert said[0] == "KOALA U-Net Swap in place"
        assert said[1].startswith("models/diffusion_models has no U-Net yet")
        assert one(page, "KoalaUNetSwap")["widgets"]["unet_name"] in ("", None)
    finally:
        folder.rmdir()
        aside.rename(folder)
    page.evaluate("() => window.app.refreshComboInNodes()")
    page.wait_for_timeout(500)
    choose(page, nodes_2, FILES[1])
    assert settings(page) == [*LIGHTNING_WIDGETS.values()]


def test_lightnings_settings_come_with_its_file(client: Client, files: None) -> None:
    inputs = client.object_info()["KoalaUNetSwap"]["input"]["required"]
    published = inputs["unet_name"][1]["koala_published"]
    assert published["koala-lightning-700m.fp16.safetensors"] == LIGHTNING_WIDGETS
    assert published[""] == BASE_WIDGETS  # where none is chosen yet


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
