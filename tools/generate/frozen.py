"""Graphs as this version of the pack saves them, kept for ever: `python3 dev.py generate frozen`, once a version.

For each shipped workflow, and for graphs that have every node of ours, a pair of files below ``FOLDER/<version>``:
``<name>.json`` as the canvas saves a workflow (widgets by their place), ``<name>.api.json`` as it exports one for
POST /prompt (inputs by their names). Later versions have to open both with every value in its place. What comes to a
version before its release is written beside what is there, which stays as it is: ``CHECKSUMS`` lists every file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

from tools.generate.canvas import PROJECT
from tools.generate.generator import Generator, shown
from tools.generate.workflows import FOLDER as SHIPPED
from tools.generate.workflows import as_text, name_of
from tools.harness import browser, testhost
from tools.harness.server import running
from tools.harness.testhost import ROOT, say

FOLDER = ROOT / "tests" / "host" / "workflows"
CHECKSUMS = FOLDER / "SHA256SUMS"
EVERY_NODE = "every node"
ACCELERATED = f"{EVERY_NODE}, acceleration"
ADD_ONS = f"{EVERY_NODE}, built-in add-ons"
LEARNED = f"{EVERY_NODE}, LoRA from SDXL"
API = ".api"  # in the name of a file that is in the format of POST /prompt


@dataclass(frozen=True)
class Placed:
    """A node of the graph with every node: widgets that are not at their defaults, and by socket (node, output)."""

    type: str
    widgets: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)


PARTS = {"unet_name": "unet", "clip_name1": "clip-l", "clip_name2": "clip-g", "vae_name": "vae"}
LORA = {"lora_name": "lora.safetensors", "strength_model": 0.75, "trained_on": "SDXL"}


def source(kind: str, **files: str) -> dict[str, Any]:
    """Widgets of a loader; a dynamic combo before what it brings."""
    named = {f"source.{widget}": f"{name}.safetensors" for widget, name in files.items()}
    return {"source": kind, **named, "weight_dtype": "fp16"}


GRAPH = {
    "parts": Placed("KoalaCheckpointLoader", source("U-Net + text encoders + VAE", **PARTS)),
    "mixed": Placed(
        "KoalaCheckpointLoader", source("U-Net + SDXL checkpoint", unet_name="unet", ckpt_name="checkpoint")
    ),
    "file": Placed("KoalaCheckpointLoader", source("checkpoint", ckpt_name="checkpoint")),
    "info": Placed("KoalaModelInfo", {}, {"model": ("mixed", 0)}),
    "lora": Placed(
        "KoalaLoraLoader",
        {**LORA, "strength_clip": 0.5, "fold_removed": 0.25},
        {"model": ("parts", 0), "clip": ("parts", 1)},
    ),
    "swap": Placed("KoalaUNetSwap", {"unet_name": "unet.safetensors", "weight_dtype": "bf16"}, {"model": ("lora", 0)}),
    "patches": Placed("KoalaAttentionPatches", {}, {"model": ("swap", 0)}),
    "hook": Placed("KoalaHookLora", LORA, {"model": ("patches", 0)}),
    "hooked": Placed("SetClipHooks", {}, {"clip": ("lora", 1), "hooks": ("hook", 0)}),
    "prompt": Placed(
        "KoalaPrompt",
        {"positive": "a koala", "negative": "blurry", "style": "Cinematic", "mode": "comfy"},
        {"clip": ("hooked", 0)},
    ),
    "control": Placed("ControlNetLoader", {"control_net_name": "controlnet.safetensors"}),
    "fitted": Placed("KoalaControlNet", {}, {"control_net": ("control", 0)}),
    "picture": Placed("EmptyImage"),
    "applied": Placed(
        "ControlNetApplyAdvanced",
        {},
        {"positive": ("prompt", 0), "negative": ("prompt", 1), "control_net": ("fitted", 0), "image": ("picture", 0)},
    ),
    "latent": Placed("EmptyLatentImage", {"width": 128, "height": 256}),
    "sampler": Placed(
        "KoalaSampler",
        {
            "seed": 7,
            "control_after_generate": "fixed",
            "preset": "custom",
            "preset.steps": 12,
            "preset.cfg": 3.5,
            "preset.spacing": "trailing",
            "sampler_name": "heun",
            "denoise": 0.5,
        },
        {
            "model": ("patches", 0),
            "positive": ("applied", 0),
            "negative": ("applied", 1),
            "latent_image": ("latent", 0),
        },
    ),
    "decoded": Placed("VAEDecode", {}, {"samples": ("sampler", 0), "vae": ("parts", 2)}),
    "shown": Placed("PreviewImage", {}, {"images": ("decoded", 0)}),
    "scheduler": Placed(
        "KoalaScheduler", {"steps": 13, "spacing": "trailing", "denoise": 0.75}, {"model": ("patches", 0)}
    ),
    "sigmas": Placed("PreviewAny", {}, {"source": ("scheduler", 0)}),
    "saved": Placed(
        "KoalaCheckpointSave",
        {"format": "diffusers folder", "format.filename_prefix": "diffusers/mine", "weight_dtype": "fp16"},
        {"model": ("patches", 0), "clip": ("lora", 1), "vae": ("parts", 2)},
    ),
    "saved file": Placed("KoalaCheckpointSave", {"format.filename_prefix": "checkpoints/mine"}, {"model": ("file", 0)}),
}
"""The nodes of ours, and so connected that each output needs a file which no server has: nothing of it is ever run."""

CUSTOM = {
    "preset": "custom",
    "preset.reuse": "fast",
    "preset.guidance_start": 0.25,
    "preset.guidance_end": 0.75,
    "preset.cpu_routines": "bf16",
}
ACCELERATED_GRAPH = {
    "file": GRAPH["file"],
    "custom": Placed("KoalaAccelerate", CUSTOM, {"model": ("file", 0), "vae": ("file", 2)}),
    "preset": Placed("KoalaAccelerate", {"preset": "fast"}, {"model": ("file", 0)}),
    "info": Placed("KoalaModelInfo", {}, {"model": ("custom", 0)}),
    "info 2": Placed("KoalaModelInfo", {}, {"model": ("preset", 0)}),
    "picture": Placed("EmptyImage"),
    "encoded": Placed("VAEEncode", {}, {"pixels": ("picture", 0), "vae": ("custom", 1)}),
    "saved": Placed("SaveLatent", {}, {"samples": ("encoded", 0)}),
}
"""The same for the node that came after the first graph was frozen: as custom, and as a preset without a VAE."""
ADD_ONS_GRAPH = {
    "tiny": Placed("KoalaCheckpointLoader", {"weight_dtype": "fp16"}),
    "lora": Placed(
        "KoalaLoraLoader",
        {"lora_name": "built-in koala-tiny-cyan", "strength_model": 1.5},
        {"model": ("tiny", 0), "clip": ("tiny", 1)},
    ),
    "hook": Placed("KoalaHookLora", {"lora_name": "built-in koala-tiny-cyan"}, {"model": ("lora", 0)}),
    "report": Placed("PreviewAny", {}, {"source": ("lora", 2)}),
    "hook report": Placed("PreviewAny", {}, {"source": ("hook", 1)}),
    "control": Placed("KoalaControlNetLoader", {"control_net_name": "built-in koala-tiny-outline"}),
    "prompt": Placed("KoalaPrompt", {"positive": "a cyan star"}, {"clip": ("lora", 1)}),
    "picture": Placed("EmptyImage"),
    "applied": Placed(
        "ControlNetApplyAdvanced",
        {},
        {"positive": ("prompt", 0), "negative": ("prompt", 1), "control_net": ("control", 0), "image": ("picture", 0)},
    ),
    "positive": Placed("PreviewAny", {}, {"source": ("applied", 0)}),
}
"""The same with koala-tiny's own add-ons, which need no file."""
LEARNED_GRAPH = {
    "file": GRAPH["file"],
    "sdxl": Placed("CheckpointLoaderSimple", {"ckpt_name": "sdxl.safetensors"}),
    "changed": Placed(
        "LoraLoader",
        {"lora_name": "lora.safetensors", "strength_model": 0.75},
        {"model": ("sdxl", 0), "clip": ("sdxl", 1)},
    ),
    "lora": Placed(
        "KoalaLoraFromSdxl",
        {
            "prompts": "a koala\na star",
            "preset": "custom",
            "preset.steps": 4,
            "preset.cfg": 1.0,
            "preset.spacing": "trailing",
            "rank": 16,
            "samples": 64,
            "size": 512,
            "seed": 7,
        },
        {
            "sdxl": ("sdxl", 0),
            "sdxl_changed": ("changed", 0),
            "koala": ("file", 0),
            "clip": ("sdxl", 1),
            "clip_changed": ("changed", 1),
        },
    ),
    "applied": Placed("LoraModelLoader", {}, {"model": ("file", 0), "lora": ("lora", 0)}),
    "info": Placed("KoalaModelInfo", {}, {"model": ("applied", 0)}),
    "saved": Placed("SaveLoRA", {}, {"lora": ("lora", 0)}),
    "report": Placed("PreviewAny", {}, {"source": ("lora", 1)}),
}
"""The same for the node that makes a LoRA, with core's nodes that take it."""
BUILT = {
    EVERY_NODE: GRAPH,
    ACCELERATED: ACCELERATED_GRAPH,
    ADD_ONS: ADD_ONS_GRAPH,
    LEARNED: LEARNED_GRAPH,
}
"""Graphs that are frozen beside the shipped ones, by their titles."""

BUILD = """(graph) => {
    const made = {};
    let x = 0;
    for (const [name, [type, widgets, links]] of Object.entries(graph)) {
        const node = (made[name] = LiteGraph.createNode(type));
        window.app.rootGraph.add(node);
        for (const [key, value] of Object.entries(widgets)) {
            const widget = node.widgets.find((known) => known.name === key);
            widget.value = value;
            widget.callback?.(value);
        }
        for (const [socket, [source, output]] of Object.entries(links)) made[source].connect(output, node, socket);
        node.pos = [x, 0];
        x += node.size[0] + 60;
    } }"""


def opened(page: Page) -> tuple[dict[str, Any], dict[str, Any]]:
    """The graph on the canvas in both formats: as it is saved, and as it is queued."""
    saved, queued = page.evaluate(
        "async () => [window.app.rootGraph.serialize(), (await window.app.graphToPrompt()).output]"
    )
    return saved, queued


def write(folder: Path) -> None:
    """Write those of this version's files that are not there; what was saved once does not change."""
    missing = {name: file for name, file in shipped().items() if not (folder / f"{name}.json").exists()}
    built = {title: graph for title, graph in BUILT.items() if not (folder / f"{title}.json").exists()}
    if not missing and not built:
        return
    with (
        running(testhost.test_host()) as server,
        browser.browser() as chromium,
        browser.canvas(chromium, server.url, nodes_2=False) as page,
    ):
        graphs = {}
        for name, file in missing.items():
            browser.open_workflow(page, json.loads(file.read_text("utf-8")))
            graphs[name] = opened(page)
        for title, graph in built.items():
            page.evaluate("async () => { await window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow') }")
            page.evaluate("() => window.app.rootGraph.clear()")
            page.evaluate(BUILD, {name: astuple(node) for name, node in graph.items()})
            graphs[title] = opened(page)
    folder.mkdir(parents=True, exist_ok=True)
    for title, (saved, queued) in graphs.items():
        (folder / f"{title}.json").write_text(as_text(saved), "utf-8")
        (folder / f"{title}{API}.json").write_text(as_text(queued), "utf-8")
        say(f"frozen: {shown(folder / title)}.json")
    CHECKSUMS.write_text(checksums({**files(), **listed()}), "utf-8")


def shipped() -> dict[str, Path]:
    """Each shipped workflow's file by the graph's name: its place in the list may become another."""
    return {name_of(file.stem): file for file in sorted(SHIPPED.glob("*.json"))}


def files() -> dict[str, str]:
    """Each frozen file, by its path below ``FOLDER``, and the SHA-256 of its bytes."""
    paths = sorted(FOLDER.glob("*/*.json"))
    return {path.relative_to(FOLDER).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def listed() -> dict[str, str]:
    """The same as ``CHECKSUMS`` lists it."""
    if not CHECKSUMS.is_file():
        return {}
    lines = (line.split("  ", 1) for line in CHECKSUMS.read_text("utf-8").splitlines())
    return {name: digest for digest, name in lines}


def checksums(digests: Mapping[str, str]) -> str:
    """The text of ``CHECKSUMS``, as ``sha256sum -c`` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def check() -> list[str]:
    """A line for each frozen file that was changed or is gone, and for each graph that this version has not frozen."""
    folder, known, present = FOLDER / PROJECT["version"], listed(), files()
    changed = [
        f"{shown(FOLDER / name)}: {'was changed' if name in present else 'is gone'}; frozen files stay as they are, "
        "take it back from the last commit"
        for name, digest in known.items()
        if present.get(name) != digest
    ]
    wanted = [folder / f"{title}.json" for title in (*shipped(), *BUILT)]
    missing = [f"{shown(path)}: missing" for path in sorted(wanted) if not path.is_file()]
    unlisted = [f"{shown(FOLDER / name)}: not in {CHECKSUMS.name}" for name in present if name not in known]
    return changed + missing + unlisted


GENERATOR = Generator(lambda _: write(FOLDER / PROJECT["version"]), check)
