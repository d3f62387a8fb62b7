"""The images of the help pages and of README.md, taken from the real canvas: `python3 dev.py generate pictures`.

Each node is shown as it is after a run with the built-in koala-tiny, in Nodes 2.0; those that need a model that is not
built in are shown before one.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Page
from safetensors.torch import save_file

from tools.generate import drawn, locales, sheet
from tools.generate.generator import Generator, shown
from tools.generate.workflows import workflows
from tools.harness import browser, testhost
from tools.harness.assets import SHIPPED
from tools.harness.client import Client
from tools.harness.server import running
from tools.harness.testhost import say
from tools.synthetic import adapters

HELP = testhost.ROOT / "web" / "docs" / "images"
DOCS = testhost.ROOT / "docs"
LORA = "an-sdxl-lora.safetensors"
FILES = ("diffusion_models/koala-700m.fp16.safetensors", "checkpoints/sd_xl_base_1.0.safetensors")
GRAPH = "01 KOALA-tiny text to image"
CANVAS = DOCS / "canvas.png"
SHEET = DOCS / "contact-sheet.png"
CUT = (150, 200, 1420, 720)  # of the canvas: left, top, right, bottom
COLOURS = 96  # of an image's palette
ADDED = ("KoalaScheduler", "KoalaLoraLoader", "KoalaHookLora", "KoalaAttentionPatches", "KoalaAccelerate")
"""Nodes that ``ADD`` puts beside those of the workflow, which has the others that run."""
NOT_RUN = ("KoalaUNetSwap", "KoalaLoraFromSdxl", "KoalaControlNet", "KoalaControlNetLoader", "KoalaCheckpointSave")
"""Nodes that are shown before a run."""

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
SHOW = """([types]) => {
    const graph = window.app.rootGraph;
    graph.clear();
    types.forEach((type, at) => {
        const node = LiteGraph.createNode(type);
        node.pos = [500 * at, 0];
        graph.add(node);
    });
}"""


def sources() -> dict[Path, str]:
    """Each image, and the digest of what it shows, as far as that is in files: the graph, the node's names."""
    workflow = workflows()[GRAPH]
    run = drawn.graph(workflow)
    names = {
        node: {key: text for key, text in locales.leaves(texts).items() if key[-1] in ("display_name", "name")}
        for node, texts in locales.read(locales.ENGLISH)["nodeDefs"].items()
    }
    names_of = {node: sorted((" ".join(key), text) for key, text in texts.items()) for node, texts in names.items()}
    in_workflow = [node["type"] for node in workflow["nodes"] if node["type"].startswith("Koala")]
    made = {HELP / f"{node}.png": drawn.digest([run, ADD, names_of[node]]) for node in (*in_workflow, *ADDED)}
    made |= {HELP / f"{node}.png": drawn.digest([SHOW, names_of[node]]) for node in NOT_RUN}
    made[SHEET] = drawn.digest([run, drawn.file_digest(SHIPPED), drawn.file_digest(Path(sheet.__file__))])
    return {**made, CANVAS: drawn.digest([run, [names_of[node] for node in in_workflow]])}


def check() -> list[str]:
    """A line for each image that is out of date, or whose node is gone."""
    wanted = sources()
    gone = sorted({*HELP.glob("*.png")} - wanted.keys())
    return drawn.faults(wanted, "PNG") + [f"{shown(path)}: its node is gone; delete it" for path in gone]


def write(redraw: bool) -> None:
    """Draw the images that are out of date, or all of them."""
    wanted = drawn.to_draw(sources(), redraw)
    if not wanted:
        return
    HELP.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="koala-pictures-") as temporary:
        draw(Path(temporary))
        for path in wanted:
            if path == SHEET:
                Image.open(Path(temporary) / path.name).save(path, optimize=True)
            else:
                small(Path(temporary) / path.name, path, CUT if path == CANVAS else None)
            say(f"drawn: {shown(path)}")
    drawn.record(wanted)


def draw(folder: Path) -> None:
    """Take every image, at full size, into a folder."""
    with running(testhost.test_host()) as server, browser.browser() as chromium:
        client = Client(server.url)
        sheet.contact_sheet(client, client.object_info()).save(folder / SHEET.name)
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
            screenshots_of_nodes(page, folder)
            page.evaluate(SHOW, [NOT_RUN])
            page.wait_for_timeout(500)
            screenshots_of_nodes(page, folder)
        with browser.canvas(chromium, server.url, nodes_2=True) as page:
            browser.open_workflow(page, workflows()[GRAPH])
            browser.run(page)
            browser.see_all(page)
            page.wait_for_timeout(6000)  # the host's own message about the finished run goes
            browser.screenshot(page, folder, CANVAS.stem)


def screenshots_of_nodes(page: Page, folder: Path) -> None:
    """An image of each of our nodes that is on the canvas, under its id."""
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
        path = folder / f"{node['type']}.png"
        page.locator(f'[data-node-id="{node["id"]}"]').first.screenshot(path=str(path))


def small(image: Path, target: Path, cut: tuple[int, int, int, int] | None = None) -> None:
    """Write an image, cut to (left, top, right, bottom) in pixels, with a palette of its own colours."""
    opened = Image.open(image).convert("RGB").crop(cut)
    palette = opened.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(target, optimize=True)


GENERATOR = Generator(write, check)
