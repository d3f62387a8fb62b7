"""SDXL graphs as a person may have them, for the swap: written down in short, built on the canvas.

Each is drawn by a small SDXL and koala-tiny's text encoders and VAE; the same sampler seed gives the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Page

SETTINGS = {"steps": 30, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
"""What SDXL's samplers are set to before the swap."""
SEED = 5
PROMPT = "a red circle on a white background"
LORA = {"lora_name": "koala-tiny-cyan.safetensors", "strength_model": 1.0}
SAMPLER = {"seed": SEED, "control_after_generate": "fixed", **SETTINGS, "denoise": 1.0}
NOISE = {"noise_seed": SEED, "control_after_generate": "fixed"}
BYPASSED, MUTED = 4, 2

Link = tuple[str, int, str, str]
"""Source, its output, target, name of its input."""


@dataclass(frozen=True)
class Graph:
    """Nodes by name: their type and the values of their widgets; links; modes that are not 0; and, from the inside to
    the outside, the nodes that are put into a subgraph, by its name."""

    nodes: dict[str, tuple[str, dict[str, Any]]]
    links: tuple[Link, ...]
    modes: dict[str, int] = field(default_factory=dict)
    subgraphs: dict[str, tuple[str, ...]] = field(default_factory=dict)


COMMON: dict[str, tuple[str, dict[str, Any]]] = {
    "SDXL": ("TinySDXL", {}),
    "positive": ("CLIPTextEncode", {"text": PROMPT}),
    "negative": ("CLIPTextEncode", {"text": ""}),
    "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
}


def graph(
    samplers: dict[str, tuple[str, dict[str, Any]]],
    links: list[Link],
    others: dict[str, tuple[str, dict[str, Any]]] | None = None,
    clip: str = "SDXL",
    images: tuple[str, ...] = (),
    **further: Any,
) -> Graph:
    """A graph with these samplers, each with an image of its own (``images``: of these only).

    ``links`` are the MODEL's and what is special; prompts, latents and images are linked here.
    """
    nodes, wires = {**COMMON, **(others or {}), **samplers}, list(links)
    given = {(target, name) for _, _, target, name in links}
    wires += [(clip, 1, text, "clip") for text in ("positive", "negative")]
    for name in samplers:
        sources = (("positive", 0, "positive"), ("negative", 0, "negative"), ("latent", 0, "latent_image"))
        if nodes[name][0] == "SamplerCustomAdvanced":
            sources = sources[2:]
        wires += [(source, slot, name, target) for source, slot, target in sources if (name, target) not in given]
        if not images or name in images:
            nodes[f"{name} VAE"], nodes[f"{name} image"] = ("VAEDecode", {}), ("SaveImage", {"filename_prefix": name})
            wires += [
                (name, 0, f"{name} VAE", "samples"),
                ("SDXL", 2, f"{name} VAE", "vae"),
                (f"{name} VAE", 0, f"{name} image", "images"),
            ]
    return Graph(nodes, tuple(wires), **further)


BUILD = """async (graph) => {
    const { rootGraph, canvas } = window.app;
    canvas.setGraph(rootGraph);
    await window.app.loadGraphData({ version: 0.4, nodes: [], links: [], groups: [], config: {}, extra: {},
                                     last_node_id: 0, last_link_id: 0 });
    const made = {};
    let at = 0;
    for (const [name, [type, values]] of Object.entries(graph.nodes)) {
        const node = LiteGraph.createNode(type);
        node.title = name;
        node.pos = [300 * (at % 5), 420 * Math.floor(at / 5)];
        at += 1;
        window.app.rootGraph.add(node);
        node.mode = graph.modes[name] ?? 0;
        for (const [widget, value] of Object.entries(values)) {
            const found = node.widgets.find((known) => known.name === widget);
            found.value = value;
            found.callback?.(value);
        }
        made[name] = node;
    }
    for (const [source, output, target, input] of graph.links) made[source].connect(output, made[target], input);
    for (const [name, inner] of Object.entries(graph.subgraphs)) {
        const { node } = window.app.rootGraph.convertToSubgraph(new Set(inner.map((each) => made[each])));
        node.title = name;
        made[name] = node;
    }
}"""


def build(page: Page, wanted: Graph) -> None:
    """Put a graph on the canvas, in place of what is there, and make it what undo comes back to."""
    described = {
        "nodes": wanted.nodes,
        "links": wanted.links,
        "modes": wanted.modes,
        "subgraphs": wanted.subgraphs,
    }
    page.evaluate(BUILD, described)
    page.wait_for_timeout(300)
    page.evaluate(
        """() => { const tracker = window.app.extensionManager.workflow.activeWorkflow.changeTracker;
            (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
            tracker.reset(); tracker.undoQueue.length = 0; }"""
    )


def chain(*names: str) -> list[Link]:
    """MODEL links from each to the next."""
    return [(source, 0, target, "model") for source, target in zip(names, names[1:], strict=False)]
