"""The pack's two commands on the real canvas: swap a U-Net for KOALA, insert a text-to-image graph."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page

from koala_sdxl.koala.releases import BASE, LIGHTNING
from tests.browser.canvas import Shoot, click_title, overlaps, workflow
from tools.harness import browser
from tools.harness.client import Client

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


def test_a_model_that_leaves_its_subgraph_is_swapped_from_outside(page: Page) -> None:
    browser.open_workflow(page, without_swap())
    page.evaluate(
        """() => { const { canvas, rootGraph } = window.app;
            const loader = rootGraph.nodes.find((node) => node.type === 'CheckpointLoaderSimple');
            const { node, subgraph } = rootGraph.convertToSubgraph(new Set([loader]));
            window.koalaSubgraph = node;
            canvas.setGraph(subgraph);
            canvas.selectItems([subgraph.nodes[0]]);
            return window.app.extensionManager.command.execute('KOALA.SwapUNet'); }"""
    )
    page.get_by_text("leaves this subgraph").wait_for()
    page.evaluate(
        """() => { const { canvas, rootGraph } = window.app;
            canvas.setGraph(rootGraph);
            canvas.selectItems([window.koalaSubgraph]);
            return window.app.extensionManager.command.execute('KOALA.SwapUNet'); }"""
    )
    swap, outside = one(page, "KoalaUNetSwap"), page.evaluate("() => window.koalaSubgraph.id")
    assert swap["inputs"]["model"] == outside
    assert one(page, "KSampler")["inputs"]["model"] == swap["id"]


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
