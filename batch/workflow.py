"""Workflows to run over a table: the server's own form, an image that it saved, or the canvas's form."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image, UnidentifiedImageError

from tools.harness.client import Prompt
from tools.harness.errors import UserError
from tools.harness.workflow import ObjectInfo, to_prompt

Graph = Prompt
"""Node id -> {"class_type", "inputs", and maybe "_meta" with the title}: API format, what the server runs."""

PNG = b"\x89PNG\r\n\x1a\n"
PARTS = ("class_type", "inputs", "_meta")
"""What a node of a graph has. Older servers also save what their cache knew of it."""
EXPORT = "export it with File > Export (API) in ComfyUI"


@dataclass(frozen=True)
class Workflow:
    """A graph to run. ``source`` is how errors name it; ``canvas`` its UI form, if the file has one, for the PNGs."""

    source: str
    graph: Graph
    canvas: dict[str, Any] | None


def read(path: Path, object_info: Callable[[], ObjectInfo]) -> Workflow:
    """The workflow in a JSON file of either form or in a PNG that ComfyUI saved.

    ``object_info`` is asked for every node's schema, as GET /object_info answers, only where the file has nothing but
    the UI form. Raises UserError, whose first line is complete in itself, for a file without a well-formed workflow.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such workflow; check the path") from error
    except OSError as error:
        raise UserError(f"{path}: the workflow cannot be read: {error.strerror}") from error
    if content.startswith(PNG):
        return _from_png(path, object_info)
    if content.startswith(b"\xff\xd8") or (content.startswith(b"RIFF") and content[8:12] == b"WEBP"):
        raise UserError(f"{path}: a JPEG or WEBP image; give the PNG that ComfyUI saved, or the workflow as JSON")
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: neither JSON nor PNG ({error}); {EXPORT}") from error
    if _is_canvas(document):
        return Workflow(path.name, _converted(path, document, object_info), document)
    if (
        isinstance(document, dict)
        and isinstance(document.get("prompt"), dict)
        and "class_type" not in document["prompt"]
    ):
        document = document["prompt"]  # the body of POST /prompt
    return Workflow(path.name, _checked(path, document), None)


def is_link(value: object) -> TypeGuard[list[Any]]:
    """Whether an input's value is [node id, output slot] and no value: ComfyUI's own rule."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int | float)
    )


def title(node: dict[str, Any]) -> str:
    """What the canvas shows above a node, or its class; on one line."""
    meta = node.get("_meta")
    shown = meta.get("title") if isinstance(meta, dict) else None
    return " ".join(str(shown or node["class_type"]).split())


def _from_png(path: Path, object_info: Callable[[], ObjectInfo]) -> Workflow:
    try:
        with Image.open(path) as image:
            texts = dict(image.text)  # type: ignore[attr-defined]  # PngImageFile, by the file's first bytes
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: the PNG is damaged ({error}); take another copy of it") from error
    forms = {name: _loaded(path, name, texts[name]) for name in ("prompt", "workflow") if name in texts}
    canvas = forms.get("workflow")
    if "prompt" in forms:
        return Workflow(path.name, _checked(path, forms["prompt"]), canvas if _is_canvas(canvas) else None)
    if _is_canvas(canvas):
        return Workflow(path.name, _converted(path, canvas, object_info), canvas)
    has = f"only the text {', '.join(map(repr, texts))}" if texts else "no text at all"
    raise UserError(f"{path}: the PNG has no workflow, {has}; give one that ComfyUI's Save Image wrote, unedited")


def _loaded(path: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: the text {name!r} in the PNG is not JSON ({error}); take another copy of it"
        ) from error


def _is_canvas(document: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(document, dict) and isinstance(document.get("nodes"), list) and "links" in document


def _converted(path: Path, canvas: dict[str, Any], object_info: Callable[[], ObjectInfo]) -> Graph:
    """The graph of a canvas. A random choice, ``{a|b}``, falls the same way each time, so that a row stays the same."""
    if not canvas["nodes"]:
        raise UserError(f"{path}: the workflow has no nodes; save one that draws an image")
    for node in canvas["nodes"]:
        if not (isinstance(node, dict) and isinstance(node.get("id"), int | str) and isinstance(node.get("type"), str)):
            raise UserError(f"{path}: a node has no id or no type ({_short(node)}); save the workflow again in ComfyUI")
    links = canvas["links"]
    if not isinstance(links, list) or not all(isinstance(link, list) and len(link) == 6 for link in links):
        # The converter would leave them out, and so run another graph.
        raise UserError(f"{path}: the links are in a form that is not known; {EXPORT}")
    nodes = [node["id"] for node in canvas["nodes"]]
    for number, source, _, _, _, _ in links:
        if source not in nodes:
            raise UserError(f"{path}: link {number} comes from node {source}, which is not there; {EXPORT}")
    schemas = object_info()
    state = random.getstate()
    try:
        random.seed(0)
        graph = to_prompt(canvas, schemas)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the workflow cannot be converted ({error!r}); {EXPORT}") from error
    finally:
        random.setstate(state)
    return _checked(path, graph)


def _checked(path: Path, document: object) -> Graph:
    """A document as a graph, if it is one that can run."""
    if not isinstance(document, dict):
        raise UserError(f"{path}: a JSON {type(document).__name__}, expected a workflow; {EXPORT}")
    if not document:
        raise UserError(f"{path}: the workflow has no nodes; save one that draws an image")
    if not any(isinstance(node, dict) and "class_type" in node for node in document.values()):
        raise UserError(f"{path}: JSON, but no workflow (it has {_short(', '.join(document))}); {EXPORT}")
    for name, node in document.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str) or not node["class_type"]:
            raise UserError(f"{path}: node {name} has no class_type; {EXPORT}")
        if not isinstance(node.get("inputs"), dict):
            raise UserError(f"{path}: node {name} ({node['class_type']}) has no inputs; {EXPORT}")
        for key, value in node["inputs"].items():
            if is_link(value) and value[0] not in document:
                place = f"node {name} ({title(node)})"
                raise UserError(f"{path}: {place} takes {key} from node {value[0]}, which is not there; {EXPORT}")
    return {name: {part: node[part] for part in PARTS if part in node} for name, node in document.items()}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
