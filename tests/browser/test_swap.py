"""KOALA in SDXL's place by one click, in many graphs: what is done and said, what it draws, and undo.

A graph is drawn in the classic renderer, and compared with what it should draw: the same graph as one would make it
for koala-tiny from the start. In Nodes 2.0 the graph itself is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Page

from tests.browser.canvas import swap_command
from tests.browser.cases import CASES, Case
from tests.browser.graphs import Graph, build
from tools.harness import browser
from tools.harness.client import Client
from tools.harness.server import Server

LINKS = """() => {
    const { rootGraph } = window.app;
    const found = [];
    for (const graph of [rootGraph, ...rootGraph.subgraphs.values()]) {
        const name = (id) => ({ '-10': 'in', '-20': 'out' })[id] ?? graph.getNodeById(id).title;
        const kind = (link) => graph.getNodeById(link.target_id)?.inputs[link.target_slot].type
            ?? graph.outputs[link.target_slot].type;
        for (const link of graph.links.values()) {
            if (['MODEL', 'CONTROL_NET'].includes(link.type) || ['MODEL', 'CONTROL_NET'].includes(kind(link)))
                found.push(`${name(link.origin_id)} > ${name(link.target_id)}`);
        }
    }
    return found.sort();
}"""
"""The links of MODELs and ControlNets, in all graphs."""
SAVED = "() => JSON.stringify({ ...window.app.rootGraph.serialize(), extra: {} })"
VALUES = """(title) => Object.fromEntries(
    window.app.rootGraph.nodes.find((node) => node.title === title).widgets.map(({ name, value }) => [name, value]))"""
SELECT = """([titles, inside]) => {
    const { canvas, rootGraph } = window.app;
    const outer = rootGraph.nodes.find((node) => node.title === inside);
    canvas.setGraph(outer ? outer.subgraph : rootGraph);
    canvas.selectItems(canvas.graph.nodes.filter((node) => titles.includes(node.title)));
}"""


def apart(links: str) -> list[str]:
    """ "A > B > C, D > E" as single links."""
    chains = [chain.split(" > ") for chain in links.split(", ")]
    return sorted(f"{one} > {two}" for chain in chains for one, two in pairwise(chain))


BY_DAY = {"subgraph, from inside", "ControlNet"}
"""What is looked at in Nodes 2.0 by day, too: the graph is changed by the same code there, and drawn by another."""
CANVASES = [
    pytest.param(
        nodes_2, name, id=f"{'nodes2' if nodes_2 else 'classic'}-{name}",
        marks=[pytest.mark.nightly] if nodes_2 and name not in BY_DAY else [],
    )
    for nodes_2 in (False, True) for name in CASES
]  # fmt: skip


@pytest.fixture(scope="module")
def open_canvas(request: pytest.FixtureRequest, chromium: Browser, server: Server, files: None) -> Iterator[Page]:
    """One canvas for all graphs, in each renderer."""
    with browser.canvas(chromium, server.url, request.param) as page:
        page.nodes_2 = request.param  # type: ignore[attr-defined]
        yield page
        assert page.complaints == []  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def drawn(server: Server, client: Client) -> Callable[[Graph], Image.Image]:
    """What graphs for KOALA draw, each run once."""
    images: dict[str, Image.Image] = {}

    def draw(wanted: Graph) -> Image.Image:
        key = json.dumps(wanted.prompt())
        if key not in images:
            prefix = f"reference {len(images)}"
            client.run(wanted.saved_as(prefix).prompt())
            images[key] = saved(server, prefix)
        return images[key]

    return draw


def saved(server: Server, prefix: str) -> Image.Image:
    """The image with a prefix of its own, so that the server does not find it in its cache."""
    (path,) = (server.base / "output").glob(f"{prefix}_*.png")
    return Image.open(path).convert("RGB")


@pytest.mark.parametrize(("open_canvas", "name"), CANVASES, indirect=["open_canvas"])
def test_a_swap_says_what_it_did_draws_what_koala_draws_and_is_undone(
    name: str, open_canvas: Page, server: Server, drawn: Callable[[Graph], Image.Image], shots: Any
) -> None:
    page, nodes_2 = open_canvas, open_canvas.nodes_2  # type: ignore[attr-defined]
    require_swap(page, CASES[name], name)
    browser.screenshot(page, shots, f"swap {name}-{'nodes2' if nodes_2 else 'classic'}")
    if nodes_2:
        return
    page.evaluate("() => window.app.canvas.setGraph(window.app.rootGraph)")
    browser.run(page)
    assert page.evaluate("() => window.koalaDone") == "execution_success"
    assert ImageChops.difference(saved(server, name), drawn(CASES[name].drawn)).getbbox() is None


def require_swap(page: Page, case: Case, name: str) -> None:
    """A swap does and says what it should, a second one nothing; it is undone in one step, and done again."""
    build(page, case.graph.saved_as(name))
    select(page, case)
    before = page.evaluate(SAVED)
    assert swap_command(page) == list(case.said)
    assert page.evaluate(LINKS) == apart(case.links)
    for title, values in case.values.items():
        assert page.evaluate(VALUES, title).items() >= values.items()
    select(page, case)
    assert swap_command(page) == [f'"{case.click[0]}" is already followed by KOALA U-Net Swap.']
    step(page, "Undo")
    select(page, case)
    assert page.evaluate(SAVED) == before
    step(page, "Redo")
    assert page.evaluate(LINKS) == apart(case.links)


def select(page: Page, case: Case) -> None:
    """Open the case's subgraph, where it has one, and select what is clicked."""
    page.evaluate(SELECT, [case.click, case.inside])
    page.wait_for_timeout(100)  # a subgraph's border is arranged when it is drawn


def step(page: Page, name: str) -> None:
    """Undo or redo."""
    page.evaluate("(name) => window.app.extensionManager.command.execute(`Comfy.${name}`)", name)
    page.wait_for_timeout(400)
