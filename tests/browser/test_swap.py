"""KOALA in SDXL's place by one click, in many graphs: what is done and said, what it draws, and undo.

A graph is drawn in the classic renderer, and compared with what it should draw: the same graph as one would make it
for koala-tiny from the start. In Nodes 2.0, and by day in some cases, the graph alone is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import pairwise

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Page

from tests.browser.canvas import Shots, swap_command
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


DRAWN_BY_DAY = {"LoRA chain", "custom sampler chain", "subgraph, from inside", "ControlNet"}
"""A chain of patches, samplers of other kinds, subgraphs, and ControlNets."""
COMPARED_BY_DAY = {"subgraph, from outside", "unknown types", "linked steps", "several selected"}
"""The graph alone: widgets that a subgraph shows, others' nodes, settings that are linked, two swaps. By day the rules
for all other graphs are tested in tests/web: placing, samplers and swap."""
IN_NODES_2_BY_DAY = {"subgraph, from inside"}
"""The graph is changed by the same code there, and drawn by another."""
CANVASES = [
    *(pytest.param(False, name, False, id=f"classic-{name}") for name in CASES if name in COMPARED_BY_DAY),
    *(
        pytest.param(False, name, True, id=f"classic, drawn-{name}", marks=marks)
        for name, marks in ((name, [] if name in DRAWN_BY_DAY else [pytest.mark.nightly]) for name in CASES)
    ),
    *(
        pytest.param(True, name, False, id=f"nodes2-{name}", marks=marks)
        for name, marks in ((name, [] if name in IN_NODES_2_BY_DAY else [pytest.mark.nightly]) for name in CASES)
    ),
]


@pytest.fixture(scope="module")
def open_canvas(chromium: Browser, server: Server, files: None) -> Iterator[Callable[[bool], Page]]:
    """One canvas for all graphs, in each renderer."""
    with ExitStack() as stack:
        yield cache(lambda nodes_2: stack.enter_context(browser.canvas(chromium, server.url, nodes_2)))


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


@pytest.mark.parametrize(("nodes_2", "name", "draws"), CANVASES)
def test_a_swap_says_what_it_did_draws_what_koala_draws_and_is_undone(
    nodes_2: bool,
    name: str,
    draws: bool,
    open_canvas: Callable[[bool], Page],
    server: Server,
    drawn: Callable[[Graph], Image.Image],
    shots: Shots,
) -> None:
    page = open_canvas(nodes_2)
    require_swap(page, CASES[name], name)
    assert page.complaints == []  # type: ignore[attr-defined]
    shots(page, f"swap {name}-{'nodes2' if nodes_2 else 'classic'}")
    if not draws:
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
