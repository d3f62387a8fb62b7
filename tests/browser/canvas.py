"""What the tests of the canvas share: saved workflows, and what a person does with nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page

from tools.generate.workflows import shipped

Shoot = Callable[[str], object]
Shots = Callable[[Page, str], object]
in_both_renderers = pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"], indirect=True)
"""For a test of what each of them draws, or takes from the mouse, by code of its own."""


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(shipped(name).read_text("utf-8"))
    return loaded


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


def click_title(page: Page, kind: str, button: Any = "left") -> None:
    """Click a node's title."""
    x, y = page.evaluate(
        """(kind) => { const node = window.app.rootGraph.nodes.find((known) => known.type === kind);
            return window.app.canvasPosToClientPos([node.pos[0] + 60, node.pos[1] - 12]); }""",
        kind,
    )
    page.mouse.click(x, y, button=button)
    page.wait_for_timeout(600)


def swap_command(page: Page) -> list[str]:
    """Give the command to swap for what is selected; returns the lines of what is said."""
    new = ":not([data-seen])"  # others may go meanwhile: they are known by a mark, not counted
    page.evaluate(
        """() => document.querySelectorAll('.p-toast-detail, .p-toast-close-button, [data-testid^=toast]').forEach(
            (known) => { known.dataset.seen = '' })"""
    )
    page.evaluate("() => window.app.extensionManager.command.execute('KOALA.SwapUNet')")
    # as the tested canvas has it, and as newer ones
    shown = page.locator(f".p-toast-detail{new}, [data-testid=toast]{new}").first
    shown.wait_for()
    lines = [line.strip() for line in shown.inner_text().split("\n")]
    page.locator(f".p-toast-close-button{new}, [data-testid=toast-close]{new}").first.click()
    return [line for line in lines if line not in ("", "KOALA")]
