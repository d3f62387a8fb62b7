"""SDXL graphs as a person may have them, for the swap: written down in short, built on the canvas, or sent as they are.

Each is drawn by a small SDXL and koala-tiny's text encoders and VAE; the same seed gives the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from playwright.sync_api import Page

Node = tuple[str, dict[str, Any]]
"""A type and the values of its widgets."""
Link = tuple[str, int, str, str]
"""Source, its output, target, name of its input."""

SETTINGS = {"steps": 30, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
"""What SDXL's samplers are set to before the swap."""
PUBLISHED = {"steps": 25, "cfg": 7.5, "sampler_name": "euler", "scheduler": "ddim_uniform"}
SEED = 5
PROMPT = "a red circle on a white background"
BYPASSED, MUTED = 4, 2
UNET = "koala-00-tiny.safetensors"
"""koala-tiny's U-Net, the first of KOALA's files by its name."""
LORA, CONTROLNET = "tiny-cyan.safetensors", "tiny-outline.safetensors"

SDXL = "SDXL"
KOALA: Node = ("KoalaCheckpointLoader", {"source": "built-in koala-tiny", "weight_dtype": "default"})
APPLY: Node = ("ControlNetApplyAdvanced", {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0})


def ksampler(**values: Any) -> Node:
    return "KSampler", {"seed": SEED, **SETTINGS, "denoise": 1.0, **values}


def advanced(start: int, end: int, last: bool, **values: Any) -> Node:
    """KSamplerAdvanced for some of the steps."""
    noise = {"add_noise": "disable" if start else "enable", "noise_seed": SEED}
    parts = {"start_at_step": start, "end_at_step": end}
    return "KSamplerAdvanced", {
        **noise, **SETTINGS, **parts, "return_with_leftover_noise": "disable" if last else "enable", **values
    }  # fmt: skip


def lora(strength: float = 1.0, kind: str = "LoraLoader") -> Node:
    clip = {} if "ModelOnly" in kind else {"strength_clip": 1.0}
    own = {"trained_on": "auto", "fold_removed": 0.0} if kind == "KoalaLoraLoader" else {}
    return kind, {"lora_name": LORA, "strength_model": strength, **clip, **own}


@dataclass(frozen=True)
class Graph:
    """Nodes by name; links; modes that are not 0; what is put into subgraphs (the subgraph's name -> nodes), and which
    widgets a subgraph shows on its node (the subgraph's name -> node, widget)."""

    nodes: Mapping[str, Node]
    links: tuple[Link, ...]
    modes: Mapping[str, int] = field(default_factory=dict)
    subgraphs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shown: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def saved_as(self, prefix: str) -> Graph:
        """The same graph with another name for its image."""
        return replace(self, nodes={**self.nodes, "image": ("SaveImage", {"filename_prefix": prefix})})

    def prompt(self) -> dict[str, Any]:
        """The graph as the server runs it; modes and subgraphs count for nothing."""
        made: dict[str, Any] = {
            name: {"class_type": kind, "inputs": dict(values)} for name, (kind, values) in self.nodes.items()
        }
        for source, output, target, name in self.links:
            made[target]["inputs"][name] = [source, output]
        return made


def graph(*parts: str | Link, clip: str = SDXL, show: str = "KSampler", **nodes: Any) -> Graph:
    """A graph that shows what the sampler ``show`` gives.

    ``parts``: links, or "A > B > C" for a MODEL that goes from each to the next. ``nodes``: named nodes; dictionaries
    for ``modes``, ``subgraphs`` and ``shown``. Prompts, latent and image are added, and linked to whatever has a place
    for them.
    """
    further = {name: nodes.pop(name) for name in ("modes", "subgraphs", "shown") if name in nodes}
    made: dict[str, Node] = {
        SDXL: ("TinySDXL", {}),
        "positive": ("CLIPTextEncode", {"text": PROMPT}),
        "negative": ("CLIPTextEncode", {"text": ""}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        **nodes,
        "decode": ("VAEDecode", {}),
        "image": ("SaveImage", {"filename_prefix": ""}),
    }
    links: list[Link] = [(clip, 1, "positive", "clip"), (clip, 1, "negative", "clip")]
    for part in parts:
        if isinstance(part, str):
            names = part.split(" > ")
            links += [(source, 0, target, "model") for source, target in pairwise(names)]
        else:
            links.append(part)
    given = {(target, name) for _, _, target, name in links}
    for name, (kind, _) in nodes.items():
        wanted = {"positive": "positive", "negative": "negative", "latent": "latent_image"}
        if kind in TAKES:
            inputs = [(source, target) for source, target in wanted.items() if target in TAKES[kind]]
            links += [(source, 0, name, target) for source, target in inputs if (name, target) not in given]
    links += [(show, 0, "decode", "samples"), (SDXL, 2, "decode", "vae"), ("decode", 0, "image", "images")]
    return Graph(made, tuple(links), **further)


TAKES = {
    **dict.fromkeys(("KSampler", "KSamplerAdvanced"), ("positive", "negative", "latent_image")),
    "SamplerCustomAdvanced": ("latent_image",),
    **dict.fromkeys(("CFGGuider", "ControlNetApplyAdvanced"), ("positive", "negative")),
}


BUILD = """async (graph) => {
    const { rootGraph, canvas } = window.app;
    canvas.setGraph(rootGraph);
    window.app.clean(); // images of an earlier graph's nodes, which are known by their ids
    const open = (saved) => // in the tab that is open
        window.app.loadGraphData(saved, true, false, window.app.extensionManager.workflow.activeWorkflow);
    await open({ version: 0.4, nodes: [], links: [], groups: [], config: {}, extra: {},
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
        const after = node.widgets?.find((known) => known.name === 'control_after_generate');
        if (after) after.value = 'fixed';
        made[name] = node;
    }
    for (const [source, output, target, input] of graph.links) made[source].connect(output, made[target], input);
    for (const [name, inner] of Object.entries(graph.subgraphs)) {
        const { node } = window.app.rootGraph.convertToSubgraph(new Set(inner.map((each) => made[each])));
        node.title = name;
        made[name] = node;
    }
    for (const [name, [inner, widget]] of Object.entries(graph.shown)) {
        const { subgraph } = made[name];
        const node = subgraph.nodes.find((each) => each.title === inner);
        const slot = node.inputs.find((input) => input.widget?.name === widget);
        subgraph.addInput(widget, slot.type);
        subgraph.inputs.at(-1).connect(slot, node);
    }
    await open(window.app.rootGraph.serialize()); // as a file of it is opened
}"""


def build(page: Page, wanted: Graph) -> None:
    """Put a graph on the canvas, in place of what is there, and make it what undo comes back to."""
    described = {"nodes": dict(wanted.nodes), "links": wanted.links}
    further = {"modes": wanted.modes, "subgraphs": wanted.subgraphs, "shown": wanted.shown}
    page.evaluate(BUILD, {**described, **{name: dict(values) for name, values in further.items()}})
    page.wait_for_timeout(300)
    page.evaluate(
        """() => { const tracker = window.app.extensionManager.workflow.activeWorkflow.changeTracker;
            (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
            tracker.reset(); tracker.undoQueue.length = 0; }"""
    )
