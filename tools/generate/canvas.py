"""The canvas's file format (version 0.4), written from a short description of a graph.

A graph is given as its nodes in columns, as they stand on the canvas; ids, links, slots, sizes and positions follow
from that.
"""

from __future__ import annotations

import tomllib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tools.harness.testhost import ROOT, TESTED_RELEASE

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FRONTEND = "1.47.12"  # that of ComfyUI 0.30.0, which this follows

COLUMN_GAP, ROW_GAP = 60, 70  # pixels; a node's title stands 30 above its position
SLOT_HEIGHT, WIDGET_HEIGHT, PADDING = 22, 30, 20
NOTE = {"properties": {}, "color": "#432", "bgcolor": "#653"}  # the canvas's yellow


def slots(text: str) -> dict[str, str]:
    """Slots' types by their names, from ``name:TYPE`` separated by spaces."""
    return dict(slot.split(":") for slot in text.split())


DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
SEED = "SEED"  # an INT, with the widget control_after_generate behind it
IF_GIVEN = object()  # a widget that is there only while a dynamic combo has the option that brings it


class Schema(NamedTuple):
    """What a node is made of, in the canvas's order.

    ``widgets`` maps names to type and the value if none is given. ``room`` is the height in pixels that the node needs
    beside its slots and ordinary widgets: for a picture or a text.
    """

    sockets: dict[str, str]
    widgets: dict[str, tuple[str, Any]]
    outputs: dict[str, str]
    width: int = 300
    room: int = 0


SCHEMAS = {
    "KoalaCheckpointLoader": Schema(
        {},
        {
            "source": (DYNAMIC, "built-in koala-tiny"),
            **{f"source.{part}": ("COMBO", IF_GIVEN) for part in ("unet_name", "clip_name1", "clip_name2", "vae_name")},
            "weight_dtype": ("COMBO", "default"),
        },
        slots("MODEL:MODEL CLIP:CLIP VAE:VAE"),
        width=400,
    ),
    "KoalaModelInfo": Schema(slots("model:MODEL"), {}, slots("info:STRING"), width=400, room=140),
    "KoalaPrompt": Schema(
        slots("clip:CLIP"),
        {
            "positive": ("STRING", ""),
            "negative": ("STRING", ""),
            "style": ("COMBO", "no style"),
            "mode": ("COMBO", "reference"),
        },
        slots("positive:CONDITIONING negative:CONDITIONING"),
        width=420,
        room=300,
    ),
    "KoalaScheduler": Schema(
        slots("model:MODEL"),
        {"steps": ("INT", 25), "spacing": ("COMBO", "auto"), "denoise": ("FLOAT", 1.0)},
        slots("SIGMAS:SIGMAS"),
    ),
    "KoalaSampler": Schema(
        slots("model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT"),
        {
            "seed": (SEED, 0),
            "preset": (DYNAMIC, "auto"),
            "sampler_name": ("COMBO", "euler"),
            "denoise": ("FLOAT", 1.0),
        },
        slots("LATENT:LATENT"),
        width=320,
        room=260,
    ),
    "KoalaAccelerate": Schema(
        slots("model:MODEL vae:VAE"),
        {"preset": (DYNAMIC, "exact")},
        slots("MODEL:MODEL VAE:VAE"),
        width=400,
        room=80,
    ),
    "KoalaUNetSwap": Schema(
        slots("model:MODEL"),
        {"unet_name": ("COMBO", IF_GIVEN), "weight_dtype": ("COMBO", "default")},
        slots("MODEL:MODEL report:STRING"),
        width=420,
        room=160,
    ),
    "KoalaLoraLoader": Schema(
        slots("model:MODEL clip:CLIP"),
        {
            "lora_name": ("COMBO", IF_GIVEN),
            "strength_model": ("FLOAT", 1.0),
            "strength_clip": ("FLOAT", 1.0),
            "trained_on": ("COMBO", "auto"),
            "fold_removed": ("FLOAT", 0.0),
        },
        slots("MODEL:MODEL CLIP:CLIP report:STRING"),
        width=420,
        room=220,
    ),
    "KoalaControlNet": Schema(slots("control_net:CONTROL_NET"), {}, slots("CONTROL_NET:CONTROL_NET"), width=260),
    "KoalaControlNetLoader": Schema(
        {}, {"control_net_name": ("COMBO", IF_GIVEN)}, slots("CONTROL_NET:CONTROL_NET"), width=340
    ),
    "CheckpointLoaderSimple": Schema(
        {}, {"ckpt_name": ("COMBO", IF_GIVEN)}, slots("MODEL:MODEL CLIP:CLIP VAE:VAE"), width=340
    ),
    "CLIPTextEncode": Schema(
        slots("clip:CLIP"), {"text": ("STRING", "")}, slots("CONDITIONING:CONDITIONING"), width=400, room=100
    ),
    "KSampler": Schema(
        slots("model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT"),
        {
            "seed": (SEED, 0),
            "steps": ("INT", 20),
            "cfg": ("FLOAT", 8.0),
            "sampler_name": ("COMBO", "euler"),
            "scheduler": ("COMBO", "simple"),
            "denoise": ("FLOAT", 1.0),
        },
        slots("LATENT:LATENT"),
        width=320,
        room=240,
    ),
    "LoadImage": Schema(
        {},
        {"image": ("COMBO", "example.png"), "upload": ("IMAGEUPLOAD", "image")},
        slots("IMAGE:IMAGE MASK:MASK"),
        width=320,
        room=320,
    ),
    "Canny": Schema(
        slots("image:IMAGE"), {"low_threshold": ("FLOAT", 0.4), "high_threshold": ("FLOAT", 0.8)}, slots("IMAGE:IMAGE")
    ),
    "ControlNetLoader": Schema(
        {}, {"control_net_name": ("COMBO", IF_GIVEN)}, slots("CONTROL_NET:CONTROL_NET"), width=380
    ),
    "ControlNetApplyAdvanced": Schema(
        slots("positive:CONDITIONING negative:CONDITIONING control_net:CONTROL_NET image:IMAGE"),
        {"strength": ("FLOAT", 1.0), "start_percent": ("FLOAT", 0.0), "end_percent": ("FLOAT", 1.0)},
        slots("positive:CONDITIONING negative:CONDITIONING"),
        width=320,
    ),
    "EmptyImage": Schema(
        {},
        {"width": ("INT", 512), "height": ("INT", 512), "batch_size": ("INT", 1), "color": ("INT", 0)},
        slots("IMAGE:IMAGE"),
    ),
    "ImageToMask": Schema(slots("image:IMAGE"), {"channel": ("COMBO", "red")}, slots("MASK:MASK")),
    "ImageCompositeMasked": Schema(
        slots("destination:IMAGE source:IMAGE mask:MASK"),
        {"x": ("INT", 0), "y": ("INT", 0), "resize_source": ("BOOLEAN", False)},
        slots("IMAGE:IMAGE"),
    ),
    "PreviewImage": Schema(slots("images:IMAGE"), {}, slots("images:IMAGE"), width=360, room=360),
    "TrainLoraNode": Schema(
        slots("model:MODEL latents:LATENT positive:CONDITIONING"),
        {
            "batch_size": ("INT", 1),
            "grad_accumulation_steps": ("INT", 1),
            "steps": ("INT", 16),
            "learning_rate": ("FLOAT", 0.0005),
            "rank": ("INT", 8),
            "optimizer": ("COMBO", "AdamW"),
            "loss_function": ("COMBO", "MSE"),
            "seed": (SEED, 0),
            "training_dtype": ("COMBO", "bf16"),
            "lora_dtype": ("COMBO", "bf16"),
            # what follows keeps its defaults: releases of ComfyUI differ in it, and values go by their place
        },
        slots("lora:LORA_MODEL loss_map:LOSS_MAP steps:INT"),
        width=320,
        room=240,
    ),
    "LossGraphNode": Schema(
        slots("loss:LOSS_MAP"), {"filename_prefix": ("STRING", "loss_graph")}, {}, width=320, room=260
    ),
    "SaveLoRA": Schema(
        slots("lora:LORA_MODEL"),
        {"prefix": ("STRING", "loras/ComfyUI_trained_lora"), "steps": ("INT", 0)},
        {},
        width=320,
    ),
    "LoraModelLoader": Schema(
        slots("model:MODEL lora:LORA_MODEL"),
        {"strength_model": ("FLOAT", 1.0), "bypass": ("BOOLEAN", False)},
        slots("model:MODEL"),
    ),
    "EmptyLatentImage": Schema(
        {}, {"width": ("INT", 1024), "height": ("INT", 1024), "batch_size": ("INT", 1)}, slots("LATENT:LATENT")
    ),
    "KSamplerSelect": Schema({}, {"sampler_name": ("COMBO", "euler")}, slots("SAMPLER:SAMPLER")),
    "SamplerCustom": Schema(
        slots(
            "model:MODEL positive:CONDITIONING negative:CONDITIONING sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT"
        ),
        {"add_noise": ("BOOLEAN", True), "noise_seed": (SEED, 0), "cfg": ("FLOAT", 8.0)},
        slots("output:LATENT denoised_output:LATENT"),
        width=320,
        room=220,
    ),
    "VAEDecode": Schema(slots("samples:LATENT vae:VAE"), {}, slots("IMAGE:IMAGE"), width=220),
    "VAEEncode": Schema(slots("pixels:IMAGE vae:VAE"), {}, slots("LATENT:LATENT"), width=220),
    "SaveImage": Schema(
        slots("images:IMAGE"), {"filename_prefix": ("STRING", "koala")}, slots("images:IMAGE"), width=360, room=360
    ),
    "MarkdownNote": Schema({}, {"text": ("STRING", "")}, {}, width=440),
}
"""The nodes that the workflows use, as ComfyUI's GET /object_info describes them."""


class Output(NamedTuple):
    """One output of a node, to be linked to another's input."""

    node: Node
    name: str


@dataclass(eq=False)
class Node:
    """A node: ``inputs`` maps its slots to the outputs that feed them, and its widgets to such an output or a value."""

    type: str
    inputs: dict[str, Any] = field(default_factory=dict)
    models: tuple[dict[str, str], ...] = ()  # files that the host offers to fetch where they are absent
    title: str = ""  # instead of the type's own
    room: int = 0  # pixels of height beside the schema's
    after_run: str = "randomize"  # what becomes of its seed

    def __post_init__(self) -> None:
        sockets = self.schema.sockets.keys()
        if not (sockets <= self.linked <= self.inputs.keys() <= sockets | self.schema.widgets.keys()):
            raise ValueError(
                f"{self.type} is given {', '.join(self.inputs) or 'nothing'}; it has the slots "
                f"{', '.join(self.schema.sockets) or 'none'}, all to be linked, and the widgets "
                f"{', '.join(self.schema.widgets) or 'none'}."
            )

    def __getitem__(self, output: str) -> Output:
        return Output(self, output)

    @property
    def schema(self) -> Schema:
        return SCHEMAS[self.type]

    @property
    def linked(self) -> set[str]:
        """The inputs that an output feeds."""
        return {name for name, value in self.inputs.items() if isinstance(value, Output)}

    @property
    def slots(self) -> dict[str, str]:
        """The type of each input: slots, then widgets, which can be linked as well."""
        return self.schema.sockets | {name: "INT" if kind == SEED else kind for name, (kind, _) in self.widgets.items()}

    @property
    def widgets(self) -> dict[str, tuple[str, Any]]:
        """Type and value of each widget that the node shows; a linked one keeps the schema's value."""
        given = {name: value for name, value in self.inputs.items() if name not in self.linked}
        found = {name: (kind, given.get(name, value)) for name, (kind, value) in self.schema.widgets.items()}
        return {name: (kind, value) for name, (kind, value) in found.items() if value is not IF_GIVEN}

    @property
    def values(self) -> list[Any]:
        """The widgets' values in their order, a seed's followed by what becomes of it after a run."""
        widgets = self.widgets.values()
        return [part for kind, value in widgets for part in ((value, self.after_run) if kind == SEED else (value,))]

    @property
    def size(self) -> tuple[int, int]:
        rows = max(len(self.schema.sockets), len(self.schema.outputs), 1)
        height = rows * SLOT_HEIGHT + len(self.values) * WIDGET_HEIGHT + PADDING + self.schema.room + self.room
        return self.schema.width, height


class Link(NamedTuple):
    """A link as the file has it: nodes by their ids, slots by their place."""

    id: int
    source: int
    output: int
    target: int
    socket: int
    type: str


Columns = Sequence[Sequence[Node]]


def canvas(title: str, columns: Columns) -> dict[str, Any]:
    """The workflow's JSON. Each column's nodes stand one below the other; they are numbered in reading order."""
    numbers = {node: number for number, node in enumerate((node for column in columns for node in column), 1)}
    sockets = [
        (node, socket, *slot)
        for node in numbers
        for socket, slot in enumerate(node.slots.items())
        if slot[0] in node.linked
    ]
    links = [
        Link(id, numbers[source], list(source.schema.outputs).index(output), numbers[node], socket, kind)
        for id, (node, socket, name, kind) in enumerate(sockets, 1)
        for source, output in [node.inputs[name]]
    ]
    placed = []
    x = 0
    for column in columns:
        y = 0
        for node in column:
            placed.append(on_canvas(node, numbers[node], (x, y), links))
            y += node.size[1] + ROW_GAP
        x += max(node.size[0] for node in column) + COLUMN_GAP
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PROJECT['name']}/{title}")),
        "revision": 0,
        "last_node_id": len(numbers),
        "last_link_id": len(links),
        "nodes": placed,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"frontendVersion": FRONTEND},
        "version": 0.4,
    }


def on_canvas(node: Node, number: int, position: tuple[int, int], links: Sequence[Link]) -> dict[str, Any]:
    """One node's JSON."""
    incoming = {link.socket: link.id for link in links if link.target == number}
    rest: dict[str, Any] = {"title": node.title} if node.title else {}
    inputs: list[dict[str, Any]] = []
    if node.type == "MarkdownNote":  # the canvas's own: no pack brings it, and its text takes no link
        rest |= NOTE
    else:
        rest |= {"properties": properties_of(node)}
        inputs = [
            {"name": name, "type": kind, **({"widget": {"name": name}} if name in node.widgets else {}), "link": link}
            for socket, (name, kind) in enumerate(node.slots.items())
            for link in [incoming.get(socket)]
        ]
    outputs = [
        {"name": name, "type": kind, "links": [link.id for link in links if link[1:3] == (number, output)]}
        for output, (name, kind) in enumerate(node.schema.outputs.items())
    ]
    return {
        "id": number,
        "type": node.type,
        "pos": position,
        "size": node.size,
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "widgets_values": node.values,
        **rest,
    }


def properties_of(node: Node) -> dict[str, Any]:
    """Which pack brings the node, so that the host can offer to install it, and the files that it names."""
    own = node.type.startswith("Koala")
    pack, version = (PROJECT["name"], PROJECT["version"]) if own else ("comfy-core", TESTED_RELEASE)
    models = {"models": node.models} if node.models else {}
    return {"Node name for S&R": node.type, "cnr_id": pack, "ver": version, **models}
