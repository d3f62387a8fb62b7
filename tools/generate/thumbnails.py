"""The images by which the canvas lists the shipped workflows; `python3 dev.py generate thumbnails` draws them.

A workflow that runs on the built-in model gets the images that it draws. The others' weights are not part of the
pack, so they get their graph as the canvas shows it: no image is ever from random weights.

The host serves ``<stem>.jpg`` beside ``<stem>.json``, and the canvas shows it in a square, cropped if it is none.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from PIL import Image
from playwright.sync_api import Browser

from tools.generate import drawn
from tools.generate.generator import Generator, shown
from tools.generate.workflows import FOLDER, models
from tools.harness import browser, testhost
from tools.harness.assets import SHIPPED
from tools.harness.client import Client
from tools.harness.server import Server, running
from tools.harness.testhost import say
from tools.harness.workflow import ObjectInfo, Workflow, to_prompt, with_widget

SIDE = 512  # pixels
QUALITY = 88
PALETTE, BACKGROUND = "light", "#d3d3d3"  # the canvas's own, in which a small graph is seen best
EXAMPLE = "example.png"  # the picture that ComfyUI comes with, and Load Image starts with
SEED = 9  # looked at: of the first two dozen the clearest koala
MARGIN = 50  # pixels of the canvas around a graph
TITLE = 30  # pixels that a node's title stands above its position
GRAPH_ONLY = """() => { for (const part of document.querySelectorAll('body *'))
    if (part.id !== 'graph-canvas' && !part.querySelector('#graph-canvas, [data-testid="transform-pane"]')
        && !part.closest('[data-testid="transform-pane"]')) part.style.visibility = 'hidden'; }"""
BOX = """([margin, title]) => {
    const nodes = window.app.rootGraph.nodes.filter((node) => node.type !== 'MarkdownNote');
    const low = (axis) => Math.min(...nodes.map((node) => node.pos[axis]));
    const high = (axis) => Math.max(...nodes.map((node) => node.pos[axis] + node.size[axis]));
    const start = window.app.canvasPosToClientPos([low(0) - margin, low(1) - title - margin]);
    const end = window.app.canvasPosToClientPos([high(0) + margin, high(1) + margin]);
    return { x: start[0], y: start[1], width: end[0] - start[0], height: end[1] - start[1] }; }"""


def images_of(client: Client, info: ObjectInfo, workflow: Workflow) -> list[Image.Image]:
    """The images that the workflow saves, in the order of its nodes."""
    prompt = to_prompt(with_widget(workflow, info, "KoalaSampler", "seed", SEED), info)
    result = client.run(prompt)
    nodes = sorted((node for node in result.outputs if result.images(node)), key=int)
    return [Image.open(io.BytesIO(client.view(image))) for node in nodes for image in result.images(node)]


def graph(chromium: Browser, server: Server, workflow: Workflow) -> Image.Image:
    """The workflow's graph in Nodes 2.0, without its note and what stands around it.

    Empty files stand in for its models, so that the canvas finds none missing.
    """
    for model in models(workflow):
        path = server.base / "models" / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with browser.canvas(chromium, server.url, nodes_2=True) as page:
        browser.open_workflow(page, workflow)
        page.evaluate(GRAPH_ONLY)
        page.wait_for_timeout(300)
        return Image.open(io.BytesIO(page.screenshot(clip=page.evaluate(BOX, [MARGIN, TITLE]))))


def square(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures side by side on a square, as large as they fit."""
    width = SIDE // len(pictures)
    made = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    for number, picture in enumerate(pictures):
        scale = min(width / picture.width, SIDE / picture.height)
        size = (round(picture.width * scale), round(picture.height * scale))
        fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        made.paste(fitted, (number * width + (width - size[0]) // 2, (SIDE - size[1]) // 2))
    return made


def thumbnails(server: Server, chromium: Browser, files: Sequence[Path]) -> dict[Path, Image.Image]:
    """The picture of each workflow file, by the path where it belongs."""
    client = Client(server.url)
    info: dict[str, Any] = client.object_info()
    requests.post(f"{server.url}/api/settings", json={"Comfy.ColorPalette": PALETTE}, timeout=30).raise_for_status()
    made = {}
    for file in files:
        workflow = json.loads(file.read_text("utf-8"))
        pictures = [graph(chromium, server, workflow)] if models(workflow) else images_of(client, info, workflow)
        made[file.with_suffix(".jpg")] = square(pictures)
    return made


def sources() -> dict[Path, str]:
    """Each thumbnail, and the digest of what it shows: a graph, or what a graph draws with the built-in model."""
    return {file.with_suffix(".jpg"): source(json.loads(file.read_text("utf-8"))) for file in FOLDER.glob("*.json")}


def source(workflow: Workflow) -> str:
    """The digest of what a workflow's thumbnail shows."""
    weights = (SHIPPED, *(SHIPPED.with_name(name) for name in own_files(workflow)))
    model = [] if models(workflow) else [SEED, *map(drawn.file_digest, weights)]
    return drawn.digest([drawn.graph(workflow), model])


def write(redraw: bool) -> None:
    """Draw the thumbnails that are out of date, or all of them."""
    wanted = drawn.to_draw(sources(), redraw)
    if not wanted:
        return
    host = testhost.test_host()
    with running(host) as server, browser.browser() as chromium:
        shutil.copyfile(host.folder / "input" / EXAMPLE, server.base / "input" / EXAMPLE)
        files = [path.with_suffix(".json") for path in sorted(wanted)]
        for path, image in thumbnails(server, chromium, files).items():
            image.save(path, quality=QUALITY, optimize=True)
            say(f"drawn: {shown(path)}, {path.stat().st_size / 1000:.0f} kB")
    drawn.record(wanted)


def check() -> list[str]:
    """A line for each thumbnail that is out of date, or whose workflow is gone."""
    wanted = sources()
    gone = sorted({*FOLDER.glob("*.jpg")} - wanted.keys())
    return drawn.faults(wanted, "JPEG") + [f"{shown(path)}: its workflow is gone; delete it" for path in gone]


GENERATOR = Generator(write, check)
