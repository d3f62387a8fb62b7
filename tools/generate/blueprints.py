"""The blueprints of subgraphs/: ready subgraphs that the canvas offers as one node.

`python3 dev.py generate blueprints` writes the files. They are made of the same nodes as the workflows are.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.releases import RELEASES, SIZES
from tools.generate.canvas import PROJECT, Columns, Node, Output, canvas
from tools.generate.generator import of_texts
from tools.generate.parts import NEGATIVE, PROMPT, empty_latent, prompt, published_loader, sampler
from tools.generate.workflows import as_text
from tools.harness.testhost import ROOT

FOLDER = ROOT / "subgraphs"
INPUT, OUTPUT = -10, -20  # ids of the two ends of every subgraph
END_WIDTH, END_HEIGHT = 120, 60  # pixels
ALIASES = ("koala", "koala text to image", "sdxl lite", "fast sdxl", "compact sdxl", "koala t2i")


def subgraph(title: str, columns: Columns, output: Output, category: str, about: str) -> dict[str, Any]:
    """The definition of a subgraph with one output, in the canvas's format: links are objects here, not lists."""
    inner = canvas(title, columns)
    nodes = [node for column in columns for node in column]
    number = nodes.index(output.node) + 1
    slot = list(output.node.schema.outputs).index(output.name)
    kind = output.node.schema.outputs[output.name]
    out = inner["last_link_id"] + 1
    inner["nodes"][number - 1]["outputs"][slot]["links"].append(out)
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [*inner["links"], (out, number, slot, OUTPUT, 0, kind)]
    right = max(node["pos"][0] + node["size"][0] for node in inner["nodes"]) + END_WIDTH
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PROJECT['name']}/blueprint/{title}")),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": out, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": title,
        "category": category,
        "description": about,
        "inputNode": {"id": INPUT, "bounding": (-2 * END_WIDTH, 0, END_WIDTH, END_HEIGHT)},
        "outputNode": {"id": OUTPUT, "bounding": (right, 0, END_WIDTH, END_HEIGHT)},
        "inputs": [],
        "outputs": [
            {
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PROJECT['name']}/blueprint/{title}/{output.name}")),
                "name": output.name,
                "type": kind,
                "linkIds": [out],
                "pos": (right + 20, 20),
            }
        ],
        "widgets": [],
        "nodes": inner["nodes"],
        "groups": [],
        "links": [dict(zip(names, link, strict=True)) for link in links],
        "extra": {},
    }


def blueprint(
    definition: dict[str, Any], columns: Columns, promoted: Sequence[tuple[Node, str]], aliases: Sequence[str]
) -> dict[str, Any]:
    """The file: one node that stands for the subgraph and shows the promoted widgets of the nodes in it.

    Where it is put and how it is found is read from ``extra``; its values are those of the nodes inside.
    """
    nodes = [node for column in columns for node in column]
    (output,) = definition["outputs"]
    root = {
        "id": len(nodes) + 1,
        "type": definition["id"],
        "pos": (0, 0),
        "size": (420, 500),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [{"name": output["name"], "type": output["type"], "links": []}],
        "title": definition["name"],
        "properties": {
            "proxyWidgets": [(str(nodes.index(node) + 1), widget) for node, widget in promoted],
            "cnr_id": PROJECT["name"],
            "ver": PROJECT["version"],
        },
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": root["id"],
        "last_link_id": 0,
        "nodes": [root],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {"BlueprintDescription": definition["description"], "BlueprintSearchAliases": list(aliases)},
    }


def text_to_image(title: str, loader: Node, text: Node, side: int, shown: Sequence[str], about: str) -> dict[str, Any]:
    """From a prompt to an image; ``shown`` are the loader's widgets that are chosen on the outside."""
    latent = empty_latent(side)
    sampling = sampler(loader["MODEL"], text, latent["LATENT"])
    decode = Node("VAEDecode", {"samples": sampling["LATENT"], "vae": loader["VAE"]})
    columns = [[loader], [text, latent], [sampling], [decode]]
    # Not the loader's source nor the sampler's preset: outside of its node a dynamic combo does not bring the widgets
    # that its options have. Those of the option that is chosen inside can be shown.
    promoted = (
        *((loader, name) for name in shown),
        *((text, name) for name in ("positive", "negative")),
        *((latent, name) for name in ("width", "height")),
        (sampling, "seed"),
    )
    definition = subgraph(title, columns, decode["IMAGE"], "KOALA", about)
    return blueprint(definition, columns, promoted, ALIASES)


def blueprints() -> dict[str, dict[str, Any]]:
    """Every shipped blueprint by its title, which is its file's stem and what the canvas lists it as."""
    release = next(release for release in RELEASES if release.name == "koala-lightning-700m")
    published, tiny = published_loader(release), Node("KoalaCheckpointLoader")
    titles = "KOALA text to image", "KOALA-tiny text to image"
    files = [name for name in published.widgets if name.startswith("source.")]
    return {
        titles[0]: text_to_image(
            titles[0],
            published,
            prompt(published, PROMPT, NEGATIVE),
            release.variant.settings.size,
            files,
            "Draws an image with KOALA, compact SDXL, using the settings the model was published with. Choose the "
            "model by its U-Net's file: base or Lightning, 700M, 1B or 1.7B. Open the subgraph for other settings.",
        ),
        titles[1]: text_to_image(
            titles[1],
            tiny,
            prompt(tiny, "a gray koala on a green background"),
            SIZES[KOALA_TINY],
            (),
            "Draws a coloured shape with koala-tiny, the test model that is part of the pack: it runs at once.",
        ),
    }


def files() -> dict[Path, str]:
    """The text of each file."""
    return {FOLDER / f"{title}.json": as_text(workflow) for title, workflow in blueprints().items()}


GENERATOR = of_texts(FOLDER, "*.json", files)
