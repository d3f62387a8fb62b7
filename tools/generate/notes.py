"""The notes in the shipped workflows: what a graph does; which files it needs, how large, and where they go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil

from tools.generate.canvas import Node

MEGABYTES = {
    "koala-700m.fp16.safetensors": 1570,
    "koala-lightning-700m.fp16.safetensors": 1570,
    "koala-clip-l.fp16.safetensors": 246,
    "koala-clip-g.fp16.safetensors": 1390,
    "koala-vae.safetensors": 335,
    "sd_xl_base_1.0.safetensors": 6900,
    "pixel-art-xl.safetensors": 170,
    "controlnet-canny-sdxl-1.0.safetensors": 2500,
}
"""Sizes of the downloads, as docs/weights.md has them."""
LICENCE = (
    "KOALA's weights are for **non-commercial use** (CreativeML Open RAIL++-M). Commercial use needs a licence "
    "agreement with ETRI: [both licences](https://github.com/youngwanLEE/sdxl-koala)."
)
OTHERS_LICENCES = "The other files have licences of their publishers: follow the links."
BUILT_IN = "Nothing to download: all files are part of the pack. They are Apache-2.0."
PER_LINE, LINE, HEAD = 64, 21, 20  # characters, pixels, pixels


def note(title: str, *paragraphs: str) -> Node:
    """A note with a heading, as high as its text."""
    text = "\n\n".join((f"## {title}", *paragraphs))
    read = re.sub(r"\]\([^)]*\)", "]", text)
    lines = sum(max(1, ceil(len(line) / PER_LINE)) for line in read.split("\n"))
    return Node("MarkdownNote", {"text": text}, title="About this workflow", room=HEAD + LINE * lines)


def model_links(*loaders: Node) -> Node:
    """The note on the files that some nodes name: links, sizes, folders, licence."""
    models = [model for loader in loaders for model in loader.models]
    folders: dict[str, list[dict[str, str]]] = {}
    for model in models:
        folders.setdefault(model["directory"], []).append(model)
    listed = [
        "\n".join((f"**{folder}**\n", *(f"- [{m['name']}]({m['url']}), {size(MEGABYTES[m['name']])}" for m in files)))
        for folder, files in folders.items()
    ]
    total = size(round(sum(MEGABYTES[model["name"]] for model in models), -2))
    ours = all("/etri-vilab/" in model["url"] for model in models)
    made = note(
        "Model links",
        *listed,
        f"Total: **{total}**. ComfyUI offers to download what is missing. A browser saves a file under its published "
        "name: give it the name shown here, put it into its folder, then press R.",
        "```\n" + "\n".join(("ComfyUI/", "└── models/", *tree(folders))) + "\n```",
        "## Licence",
        LICENCE,
        *(() if ours else (OTHERS_LICENCES,)),
    )
    made.title = "Model links"
    return made


def tree(folders: dict[str, list[dict[str, str]]]) -> Sequence[str]:
    """The lines of a folder tree below models/."""
    lines = []
    for number, (folder, files) in enumerate(folders.items(), 1):
        last = number == len(folders)
        lines.append(f"    {'└' if last else '├'}── {folder}/")
        bar = " " if last else "│"
        ends = ["├"] * (len(files) - 1) + ["└"]
        lines += [f"    {bar}   {end}── {file['name']}" for end, file in zip(ends, files, strict=True)]
    return lines


def size(megabytes: int) -> str:
    """A file's size in words."""
    return f"{megabytes} MB" if megabytes < 1000 else f"{megabytes / 1000:g} GB"
