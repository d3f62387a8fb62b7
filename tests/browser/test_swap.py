"""KOALA in SDXL's place by one click, in many graphs: what is done and said, what it draws, and undo.

A graph is drawn in the classic renderer, and compared with what it should draw: the same graph as one would make it
for koala-tiny from the start. In Nodes 2.0 the graph itself is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Page

from tests.browser.canvas import swap_command
from tests.browser.graphs import (
    APPLY,
    BYPASSED,
    CONTROLNET,
    KOALA,
    PUBLISHED,
    SDXL,
    SEED,
    SETTINGS,
    UNET,
    Graph,
    advanced,
    build,
    graph,
    ksampler,
    lora,
)
from tools.harness import browser
from tools.harness.client import Client
from tools.harness.server import Server

IN_PLACE = f"{UNET} in place"
SET = "the sampler is set as KOALA was published"
BOTH = "2 of 2 samplers set as KOALA was published"
SWAP = "KOALA U-Net Swap"
TWICE = f"2 times {SWAP} in place, one for each MODEL that is sampled"
CUSTOM = {
    "noise": ("RandomNoise", {"noise_seed": SEED}),
    "chosen": ("KSamplerSelect", {"sampler_name": SETTINGS["sampler_name"]}),
    "sigmas": ("BasicScheduler", {"scheduler": SETTINGS["scheduler"], "steps": SETTINGS["steps"], "denoise": 1.0}),
    "guider": ("CFGGuider", {"cfg": SETTINGS["cfg"]}),
    "custom": ("SamplerCustomAdvanced", {}),
}
CUSTOM_LINKS = (
    ("noise", 0, "custom", "noise"),
    ("guider", 0, "custom", "guider"),
    ("chosen", 0, "custom", "sampler"),
    ("sigmas", 0, "custom", "sigmas"),
)
CONTROL = {"net": ("ControlNetLoader", {"control_net_name": CONTROLNET}), "apply": APPLY}
HINT = ("EmptyImage", {"width": 128, "height": 128, "batch_size": 1, "color": 0x40FF20})
CONTROL_LINKS = (
    ("hint", 0, "apply", "image"),
    ("apply", 0, "KSampler", "positive"),
    ("apply", 1, "KSampler", "negative"),
)


def ours(*parts: Any, **nodes: Any) -> Graph:
    """A graph for KOALA from the start, with the published settings."""
    return graph(*parts, **{"KSampler": ksampler(**PUBLISHED), **nodes, SDXL: KOALA})


PLAIN = ours(f"{SDXL} > KSampler")
WITH_LORA = ours(f"{SDXL} > LoRA > KSampler", (SDXL, 1, "LoRA", "clip"), clip="LoRA", LoRA=lora(kind="KoalaLoraLoader"))


@dataclass(frozen=True)
class Case:
    """A graph, what is clicked, the MODEL (and ControlNet) links afterwards, what is said, and what should be drawn."""

    graph: Graph
    links: str
    said: tuple[str, ...]
    drawn: Graph
    click: tuple[str, ...] = (SDXL,)
    inside: str = ""
    """The subgraph that is open."""
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Widgets afterwards, of nodes by their titles."""


CASES = {
    "LoRA chain": Case(
        graph(
            f"{SDXL} > LoRA > weak > scaled > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            weak=lora(0.5, "LoraLoaderModelOnly"),
            scaled=("RescaleCFG", {"multiplier": 0.3}),
            KSampler=ksampler(),
        ),
        f"{SDXL} > LoRA > weak > scaled > {SWAP} > KSampler",
        (IN_PLACE, SET),
        ours(
            f"{SDXL} > LoRA > weak > scaled > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            ("LoRA", 1, "weak", "clip"),
            clip="LoRA",
            LoRA=lora(kind="KoalaLoraLoader"),
            weak=lora(0.5, "KoalaLoraLoader"),
            scaled=("RescaleCFG", {"multiplier": 0.3}),
        ),
    ),
    "two samplers": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            f"{SDXL} > plain",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            KSampler=ksampler(),
            plain=ksampler(),
        ),
        f"{SDXL} > LoRA > {SWAP} > KSampler, {SDXL} > {SWAP} > plain",
        (TWICE, BOTH),
        WITH_LORA,
    ),
    "custom sampler chain": Case(
        graph(f"{SDXL} > guider", f"{SDXL} > sigmas", *CUSTOM_LINKS, show="custom", **CUSTOM),
        f"{SDXL} > {SWAP} > guider, {SWAP} > sigmas",
        (IN_PLACE, SET),
        PLAIN,
    ),
    "subgraph, from outside": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            KSampler=ksampler(),
            subgraphs={"inner": ("LoRA", "KSampler")},
        ),
        f"{SDXL} > inner, in > LoRA > {SWAP} > KSampler",
        (IN_PLACE, SET),
        WITH_LORA,
    ),
    "subgraph, from inside": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            KSampler=ksampler(),
            subgraphs={"inner": (SDXL,)},
        ),
        f"{SDXL} > out, inner > LoRA > {SWAP} > KSampler",
        (IN_PLACE, SET),
        WITH_LORA,
        inside="inner",
    ),
    "bypassed nodes": Case(
        graph(
            f"{SDXL} > LoRA > off > compiled > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            ("LoRA", 1, "off", "clip"),
            clip="off",
            LoRA=lora(),
            off=lora(2.0),
            compiled=("TorchCompileModel", {"backend": "inductor"}),
            KSampler=ksampler(),
            modes={"off": BYPASSED, "compiled": BYPASSED},
        ),
        f"{SDXL} > LoRA > off > {SWAP} > compiled > KSampler",
        (IN_PLACE, SET),
        WITH_LORA,
    ),
    "reroutes": Case(
        graph(
            (SDXL, 0, "one", ""),
            ("one", 0, "LoRA", "model"),
            ("LoRA", 0, "two", ""),
            ("two", 0, "KSampler", "model"),
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            one=("Reroute", {}),
            two=("Reroute", {}),
            LoRA=lora(),
            KSampler=ksampler(),
        ),
        f"{SDXL} > one > LoRA > {SWAP} > two > KSampler",
        (IN_PLACE, SET),
        WITH_LORA,
    ),
    "unknown types": Case(
        graph(
            f"{SDXL} > strange > KSampler",
            "strange > user",
            strange=("UnknownPatch", {}),
            user=("UnknownUser", {}),
            KSampler=ksampler(),
        ),
        f"{SDXL} > strange > {SWAP} > KSampler, {SWAP} > user",
        (
            IN_PLACE,
            SET,
            f'not known: "strange"; {SWAP} says after a run what it carried over',
            'not known: what "user" does with the MODEL',
        ),
        ours(f"{SDXL} > strange > KSampler", strange=("UnknownPatch", {})),
    ),
    "linked steps": Case(
        graph(
            f"{SDXL} > KSampler",
            f"{SDXL} > other",
            f"{SDXL} > third",
            ("steps", 0, "KSampler", "steps"),
            ("steps", 0, "sum", "values.a"),
            ("sum", 1, "other", "steps"),
            ("count", 0, "third", "steps"),
            steps=("PrimitiveInt", {"value": 30}),
            sum=("ComfyMathExpression", {"expression": "a"}),
            count=("PrimitiveInt", {"value": 30}),
            KSampler=ksampler(),
            other=ksampler(),
            third=ksampler(),
        ),
        f"{SDXL} > {SWAP} > KSampler, {SWAP} > other, {SWAP} > third",
        (
            IN_PLACE,
            "1 of 3 samplers set as KOALA was published",
            'not set: "KSampler": steps, because it comes from "steps", which feeds other nodes, too',
            'not set: "other": steps, because it comes from "sum", which computes it',
        ),
        ours(f"{SDXL} > KSampler", KSampler=ksampler(**{**PUBLISHED, "steps": SETTINGS["steps"]})),
        values={"count": {"value": 25}, "steps": {"value": 30}},
    ),
    "base and refiner": Case(
        graph(
            f"{SDXL} > base",
            f"{SDXL} > refiner",
            ("base", 0, "refiner", "latent_image"),
            base=advanced(0, 24, last=False),
            refiner=advanced(24, 10000, last=True),
            show="refiner",
        ),
        f"{SDXL} > {SWAP} > base, {SWAP} > refiner",
        (IN_PLACE, BOTH),
        ours(
            f"{SDXL} > base",
            f"{SDXL} > refiner",
            ("base", 0, "refiner", "latent_image"),
            base=advanced(0, 20, last=False, **PUBLISHED),
            refiner=advanced(20, 10000, last=True, **PUBLISHED),
            show="refiner",
        ),
    ),
    "a swap from before": Case(
        graph(
            f"{SDXL} > old > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            old=("KoalaUNetSwap", {"unet_name": UNET}),
            KSampler=ksampler(**PUBLISHED),
        ),
        f"{SDXL} > LoRA > old > KSampler",
        (f"{SWAP} moved behind what changes SDXL's MODEL",),
        WITH_LORA,
        click=("LoRA",),
    ),
    "several selected": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            "second > plain",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            second=("TinySDXL", {}),
            LoRA=lora(),
            KSampler=ksampler(),
            plain=ksampler(),
        ),
        f"{SDXL} > LoRA > {SWAP} > KSampler, second > {SWAP} > plain",
        (TWICE, BOTH),
        WITH_LORA,
        click=(SDXL, "LoRA", "second"),
    ),
    "ControlNet": Case(
        graph(
            f"{SDXL} > KSampler",
            *CONTROL_LINKS,
            ("net", 0, "apply", "control_net"),
            KSampler=ksampler(),
            hint=HINT,
            **CONTROL,
        ),
        f"{SDXL} > {SWAP} > KSampler, net > KOALA ControlNet > apply",
        (IN_PLACE, SET, 'KOALA ControlNet put behind "net"'),
        ours(
            f"{SDXL} > KSampler",
            *CONTROL_LINKS,
            ("net", 0, "adapted", "control_net"),
            ("adapted", 0, "apply", "control_net"),
            adapted=("KoalaControlNet", {}),
            hint=HINT,
            **CONTROL,
        ),
    ),
    "LoRA beside the weights": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(kind="LoraLoaderBypass"),
            KSampler=ksampler(),
        ),
        f"{SDXL} > Load LoRA (Model and CLIP) > {SWAP} > KSampler",
        (IN_PLACE, SET, 'merges its LoRA into the weights now, so that it is carried over: "LoRA"'),
        WITH_LORA,
    ),
}

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


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes2"])
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


@pytest.mark.parametrize("name", CASES)
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
