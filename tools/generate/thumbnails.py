"""The images by which the canvas lists the shipped workflows; `python3 dev.py generate thumbnails` draws them.

Each has a few words on top. Below them, a workflow that runs on the built-in model shows the images that it draws. The
others' weights are not part of the pack, so they show the nodes of their graph that matter, near enough to be read: no
image is ever from random weights.

The host serves ``<stem>.jpg`` beside ``<stem>.json``, and the canvas shows it in a square, cropped if it is none.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import requests
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Browser

from tools.generate import drawn
from tools.generate.generator import Generator, shown
from tools.generate.workflows import FOLDER, models, name_of
from tools.harness import browser, testhost
from tools.harness.assets import CONTROLNET, LORA, SHIPPED
from tools.harness.client import Client
from tools.harness.server import Server, running
from tools.harness.testhost import say
from tools.harness.workflow import ObjectInfo, Workflow, to_prompt, with_widget

GREEN, GOLD, BLUE, PURPLE = "#2f7d4f", "#a86f00", "#2f5d9b", "#74408f"


@dataclass(frozen=True)
class Face:
    """What a thumbnail says, on which colour, and of a graph's nodes those that it shows."""

    words: str
    colour: str
    nodes: tuple[str, ...] = ()


FACES = {
    "KOALA-tiny text to image": Face("runs at once", GREEN),
    "KOALA-Lightning text to image (10 steps)": Face("Lightning: 10 steps", GOLD, ("KoalaCheckpointLoader",)),
    "KOALA-700M text to image (25 steps)": Face("700M: 25 steps", BLUE, ("KoalaCheckpointLoader",)),
    "KOALA-700M in an SDXL graph": Face("in an SDXL graph", PURPLE, ("CheckpointLoaderSimple", "KoalaUNetSwap")),
    "KOALA-700M with an SDXL LoRA": Face("SDXL's LoRAs", PURPLE, ("KoalaLoraLoader",)),
    "KOALA-700M with an SDXL ControlNet": Face("SDXL's ControlNets", PURPLE, ("KoalaControlNet", "LoadImage", "Canny")),
    "KOALA-700M accelerated": Face("accelerated", BLUE, ("KoalaAccelerate",)),
    "KOALA-700M with SamplerCustom": Face("SamplerCustom", BLUE, ("KoalaScheduler", "KSamplerSelect")),
    "KOALA-tiny image to image": Face("image to image", GREEN),
    "KOALA-tiny with a LoRA": Face("a LoRA: cyan", GREEN),
    "KOALA-tiny with a ControlNet": Face("a ControlNet", GREEN),
    "KOALA-tiny LoRA training": Face("train a LoRA", GREEN),
}
"""By the graphs' names. Green: without a download."""

SIDE = 512  # pixels
BAND, LETTERS, EDGE = 84, 46, 20  # pixels: the words' band, their size, and how near they come to its ends
QUALITY = 80
PALETTE, BACKGROUND = "light", "#d3d3d3"  # the canvas's own, in which a small graph is seen best
EXAMPLE = "example.png"  # the picture that ComfyUI comes with, and Load Image starts with
SEED = 9  # looked at: of the first two dozen the clearest koala
MARGIN = 24  # pixels of the canvas around the nodes
TITLE = 30  # pixels that a node's title stands above its position
SHARP = 2  # as many times as large as it is shown
GRAPH_ONLY = """() => { for (const part of document.querySelectorAll('body *'))
    if (part.id !== 'graph-canvas' && !part.querySelector('#graph-canvas, [data-testid="transform-pane"]')
        && !part.closest('[data-testid="transform-pane"]')) part.style.visibility = 'hidden'; }"""
CORNER = (100, 50)  # pixels of the page: where what is shown begins
NEAR = """([types, margin, title, width, height, x, y]) => {
    const nodes = window.app.rootGraph.nodes.filter((node) => types.includes(node.type));
    const low = (axis) => Math.min(...nodes.map((node) => node.pos[axis]));
    const high = (axis) => Math.max(...nodes.map((node) => node.pos[axis] + node.size[axis]));
    const [left, top, right, bottom] = [low(0) - margin, low(1) - title - margin, high(0) + margin, high(1) + margin];
    const { ds } = window.app.canvas;
    ds.scale = Math.min(width / (right - left), height / (bottom - top));
    ds.offset = [(x + width / 2) / ds.scale - (left + right) / 2, (y + height / 2) / ds.scale - (top + bottom) / 2];
    window.app.canvas.setDirty(true, true); }"""


def images_of(client: Client, info: ObjectInfo, workflow: Workflow) -> list[Image.Image]:
    """The images that the workflow saves, in the order of its nodes."""
    prompt = to_prompt(with_widget(workflow, info, "KoalaSampler", "seed", SEED), info)
    result = client.run(prompt)
    nodes = sorted((node for node in result.outputs if result.images(node)), key=int)
    saved = (image for node in nodes for image in result.images(node) if image.type == "output")
    return [Image.open(io.BytesIO(client.view(image))) for image in saved]


def graph(chromium: Browser, server: Server, workflow: Workflow, nodes: Sequence[str]) -> Image.Image:
    """The nodes of some types of the workflow's graph in Nodes 2.0, without what stands around the graph.

    Empty files stand in for its models, so that the canvas finds none missing.
    """
    for model in models(workflow):
        path = server.base / "models" / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with browser.canvas(chromium, server.url, nodes_2=True) as page:
        browser.open_workflow(page, workflow)
        page.evaluate(GRAPH_ONLY)
        width, height = SHARP * SIDE, SHARP * (SIDE - BAND)
        page.evaluate(NEAR, [nodes, MARGIN, TITLE, width, height, *CORNER])
        page.wait_for_timeout(500)
        clip: Any = {"x": CORNER[0], "y": CORNER[1], "width": width, "height": height}
        return Image.open(io.BytesIO(page.screenshot(clip=clip)))


def square(pictures: Sequence[Image.Image], face: Face) -> Image.Image:
    """The pictures on a square below the words: one fills it, several stand side by side, an arrow between them."""
    made = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    width, height = SIDE // len(pictures), SIDE - BAND
    for number, picture in enumerate(pictures):
        fills = max if len(pictures) == 1 else min
        scale = fills(width / picture.width, height / picture.height)
        size = (round(picture.width * scale), round(picture.height * scale))
        fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        made.paste(fitted, (number * width + (width - size[0]) // 2, BAND + (height - size[1]) // 2))
    draw = ImageDraw.Draw(made)
    for number in range(1, len(pictures)):
        arrow(draw, number * width, BAND + height // 2)
    draw.rectangle((0, 0, SIDE, BAND), fill=face.colour)
    letters = LETTERS
    while draw.textlength(face.words, ImageFont.load_default(letters)) > SIDE - 2 * EDGE:
        letters -= 1
    draw.text((SIDE / 2, BAND / 2), face.words, "white", ImageFont.load_default(letters), anchor="mm")
    return made


def arrow(draw: ImageDraw.ImageDraw, x: int, y: int, reach: int = 22) -> None:
    """A white disc with an arrow to the right in it."""
    draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill="white")
    draw.polygon(((x - 8, y - 12), (x - 8, y + 12), (x + 14, y)), fill="#444444")


def thumbnails(server: Server, chromium: Browser, files: Sequence[Path]) -> dict[Path, Image.Image]:
    """The picture of each workflow file, by the path where it belongs."""
    client = Client(server.url)
    info: dict[str, Any] = client.object_info()
    requests.post(f"{server.url}/api/settings", json={"Comfy.ColorPalette": PALETTE}, timeout=30).raise_for_status()
    made = {}
    for file in files:
        workflow = json.loads(file.read_text("utf-8"))
        face = FACES[name_of(file.stem)]
        pictures = [graph(chromium, server, workflow, face.nodes)] if face.nodes else images_of(client, info, workflow)
        made[file.with_suffix(".jpg")] = square(pictures, face)
    return made


def sources() -> dict[Path, str]:
    """Each thumbnail, and the digest of what it shows: a graph, or what a graph draws with the built-in model."""
    return {
        file.with_suffix(".jpg"): source(json.loads(file.read_text("utf-8")), FACES[name_of(file.stem)])
        for file in FOLDER.glob("*.json")
    }


def source(workflow: Workflow, face: Face) -> str:
    """The digest of what a workflow's thumbnail shows."""
    weights = [] if face.nodes else [SEED, *map(drawn.file_digest, (SHIPPED, LORA, CONTROLNET))]
    return drawn.digest([drawn.graph(workflow), weights, astuple(face)])


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
