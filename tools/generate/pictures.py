"""The pictures of the help pages and of README.md, taken from the real canvas.

Each node is shown as it is after a run with the built-in koala-tiny, in Nodes 2.0; those that need a model that is not
built in are shown before one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page
from safetensors.torch import save_file

from tools.generate.workflows import workflows
from tools.harness import browser, testhost
from tools.harness.server import running
from tools.synthetic import adapters

HELP = testhost.ROOT / "web" / "docs" / "images"
DOCS = testhost.ROOT / "docs"
LORA = "an-sdxl-lora.safetensors"
FILES = ("diffusion_models/koala-700m.fp16.safetensors", "checkpoints/sd_xl_base_1.0.safetensors")
GRAPH = "KOALA-tiny text to image"

ADD = """([lora]) => {
    const graph = window.app.rootGraph;
    const loader = graph.nodes.find((node) => node.type === 'KoalaCheckpointLoader');
    const put = (type, at, values = {}) => {
        const node = LiteGraph.createNode(type);
        node.pos = at;
        graph.add(node);
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find((known) => known.name === name);
            widget.value = value;
            widget.callback?.(value);
        }
        return node;
    };
    const seen = (node, output, at) => node.connect(output, put('PreviewAny', at), 'source');
    const feed = (node) => {
        loader.connect(0, node, 'model');
        if (node.inputs.some((input) => input.name === 'clip')) loader.connect(1, node, 'clip');
        return node;
    };
    const scheduler = feed(put('KoalaScheduler', [0, 800], { steps: 12 }));
    const lora_loader = feed(put('KoalaLoraLoader', [500, 800], { lora_name: lora }));
    const hook = feed(put('KoalaHookLora', [1000, 800], { lora_name: lora }));
    const patches = feed(put('KoalaAttentionPatches', [1500, 800]));
    const accelerate = feed(put('KoalaAccelerate', [2000, 800], { preset: 'balanced' }));
    loader.connect(2, accelerate, 'vae');
    seen(scheduler, 0, [0, 1600]);
    seen(lora_loader, 2, [500, 1600]);
    seen(hook, 1, [1000, 1600]);
    seen(patches, 1, [1500, 1600]);
    seen(accelerate, 0, [2000, 1600]);
}"""
LEFT = """() => {
    const graph = window.app.rootGraph;
    graph.clear();
    ['KoalaUNetSwap', 'KoalaControlNet', 'KoalaCheckpointSave'].forEach((type, at) => {
        const node = LiteGraph.createNode(type);
        node.pos = [500 * at, 0];
        graph.add(node);
    });
}"""


def main() -> None:
    host = testhost.test_host()
    HELP.mkdir(parents=True, exist_ok=True)
    with running(host) as server, browser.browser() as chromium:
        for name in FILES:
            path = server.base / "models" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        lora = server.base / "models" / "loras" / LORA
        lora.parent.mkdir(parents=True, exist_ok=True)
        save_file(adapters.lora(adapters.SMALL_SDXL, only=adapters.in_attention), lora)
        with browser.canvas(chromium, server.url, nodes_2=True) as page:
            browser.open_workflow(page, workflows()[GRAPH])
            page.evaluate(ADD, [LORA])
            browser.run(page)
            pictures_of_nodes(page)
            page.evaluate(LEFT)
            page.wait_for_timeout(500)
            pictures_of_nodes(page)
        with browser.canvas(chromium, server.url, nodes_2=True) as page:
            browser.open_workflow(page, workflows()[GRAPH])
            browser.run(page)
            browser.see_all(page)
            page.wait_for_timeout(6000)  # the host's own message about the finished run goes
            browser.screenshot(page, DOCS, "canvas")
            small(DOCS / "canvas.png", {"left": 150, "top": 200, "right": 1420, "bottom": 720})
    print(f"{HELP}: {len(list(HELP.glob('*.png')))} pictures")


def pictures_of_nodes(page: Page) -> None:
    """A picture of each of our nodes that is on the canvas, under its id."""
    page.evaluate("() => { window.app.canvas.ds.scale = 1; }")
    for node in browser.nodes(page):
        if not node["type"].startswith("Koala"):
            continue
        page.evaluate(
            """(id) => { const [x, y] = window.app.rootGraph.getNodeById(id).pos; const { ds } = window.app.canvas;
                ds.offset[0] = 500 - x; ds.offset[1] = 150 - y; window.app.canvas.setDirty(true, true); }""",
            node["id"],
        )
        page.wait_for_timeout(300)
        path = HELP / f"{node['type']}.png"
        page.locator(f'[data-node-id="{node["id"]}"]').first.screenshot(path=str(path))
        small(path)


def small(path: Path, part: dict[str, Any] | None = None) -> None:
    """Cut a picture to a part, and write it with a palette of its own colours."""
    picture = Image.open(path).convert("RGB")
    if part is not None:
        picture = picture.crop((part["left"], part["top"], part["right"], part["bottom"]))
    picture.quantize(96, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
