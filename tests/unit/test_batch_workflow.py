"""Workflows of the batch tool: each form that ComfyUI writes, and one line for each bad file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from batch.workflow import read, title
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

SAVED = sorted((ROOT / "tests" / "host" / "workflows").rglob("*.api.json"))
CANVASES = sorted((ROOT / "example_workflows").glob("*.json"))
NODE = {"class_type": "EmptyImage", "inputs": {"width": 64}}
TEXT_ENCODE = {  # as ComfyUI 0.30.0 answers at /object_info
    "CLIPTextEncode": {
        "input": {
            "required": {
                "text": ["STRING", {"multiline": True, "dynamicPrompts": True, "tooltip": "The text to be encoded."}],
                "clip": ["CLIP", {"tooltip": "The CLIP model used for encoding the text."}],
            }
        },
        "input_order": {"required": ["text", "clip"]},
        "is_input_list": False,
        "output": ["CONDITIONING"],
        "output_is_list": [False],
        "output_name": ["CONDITIONING"],
        "name": "CLIPTextEncode",
        "display_name": "CLIP Text Encode (Prompt)",
        "python_module": "nodes",
        "category": "model/conditioning",
        "output_node": False,
    }
}


def loaded(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def unasked() -> dict[str, Any]:
    """For files that need no server."""
    raise AssertionError("the server was asked for its nodes")


def written(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def png(path: Path, **texts: str) -> Path:
    """An image with texts, as ComfyUI's Save Image writes it."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8), "red").save(path, pnginfo=info, compress_level=4)
    return path


def complaint(path: Path, object_info: Callable[[], dict[str, Any]] = unasked) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        read(path, object_info)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_an_exported_graph_is_taken_as_it_is(path: Path) -> None:
    found = read(path, unasked)
    assert (found.source, found.graph, found.canvas) == (path.name, loaded(path), None)


def test_the_body_of_post_prompt(tmp_path: Path) -> None:
    found = read(written(tmp_path / "body.json", {"prompt": loaded(SAVED[0]), "client_id": "x"}), unasked)
    assert found.graph == loaded(SAVED[0])


def test_a_node_named_prompt_is_a_node(tmp_path: Path) -> None:
    assert read(written(tmp_path / "graph.json", {"prompt": NODE}), unasked).graph == {"prompt": NODE}


def test_json_with_a_byte_order_mark_and_any_suffix(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps({"1": NODE}).encode()
    assert read(written(tmp_path / "graph.txt", content), unasked).graph == {"1": NODE}


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_a_png_that_comfyui_saved(tmp_path: Path, path: Path) -> None:
    canvas = loaded(path.with_name(path.name.replace(".api.json", ".json")))
    found = read(
        png(tmp_path / "ComfyUI_00001_.png", prompt=path.read_text("utf-8"), workflow=json.dumps(canvas)), unasked
    )
    assert (found.source, found.graph, found.canvas) == ("ComfyUI_00001_.png", loaded(path), canvas)


def test_a_png_is_known_by_its_content(tmp_path: Path) -> None:
    path = png(tmp_path / "image.png", prompt=json.dumps({"1": NODE})).rename(tmp_path / "image.json")
    assert (read(path, unasked).graph, read(path, unasked).canvas) == ({"1": NODE}, None)


def test_a_png_of_an_older_server(tmp_path: Path) -> None:
    """It saved NaN, which is no JSON, for what its cache knew; and text beyond Latin-1."""
    text = '{"1": {"class_type": "A", "inputs": {"text": "코알라"}, "is_changed": [NaN]}}'
    graph = read(png(tmp_path / "image.png", prompt=text), unasked).graph
    assert graph == {"1": {"class_type": "A", "inputs": {"text": "코알라"}}}


def test_values_that_are_no_links_stay(tmp_path: Path) -> None:
    inputs = {"a": [1, 0], "b": ["x"], "c": ["x", "y"], "d": {"__value__": ["x", 0]}, "e": None}
    graph = {"1": {"class_type": "A", "inputs": inputs}}
    assert read(written(tmp_path / "graph.json", graph), unasked).graph == graph


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"class_type": "A", "_meta": {"title": "My\nnode "}}, "My node"),
        ({"class_type": "A", "_meta": {"title": ""}}, "A"),
        ({"class_type": "A", "_meta": None}, "A"),
        ({"class_type": "A"}, "A"),
    ],
)
def test_titles(node: dict[str, Any], expected: str) -> None:
    assert title(node) == expected


BAD_FILES: dict[str, tuple[Any, str]] = {
    "empty": (b"", "neither JSON nor PNG"),
    "text": (b"a koala", "neither JSON nor PNG"),
    "cut": (b'{"1": {"class_type": "A"', "neither JSON nor PNG"),
    "deep": (b"[" * 100_000, "neither JSON nor PNG"),
    "latin": (b'{"caf\xe9": 1}', "neither JSON nor PNG"),
    "jpeg": ((ROOT / "example_workflows" / "01 KOALA-tiny text to image.jpg").read_bytes(), "a JPEG or WEBP image"),
    "webp": (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "a JPEG or WEBP image"),
    "list": ([NODE], "a JSON list, expected a workflow"),
    "number": (7, "a JSON int, expected a workflow"),
    "no nodes": ({}, "the workflow has no nodes"),
    "no nodes, wrapped": ({"prompt": {}}, "the workflow has no nodes"),
    "other JSON": ({"name": "koala", "version": 1}, "JSON, but no workflow (it has name, version)"),
    "no class": ({"1": NODE, "2": {"inputs": {}}}, "node 2 has no class_type"),
    "class is no text": ({"1": NODE, "2": {"class_type": 7, "inputs": {}}}, "node 2 has no class_type"),
    "node is no object": ({"1": NODE, "2": "x"}, "node 2 has no class_type"),
    "no inputs": ({"1": NODE, "2": {"class_type": "SaveImage"}}, "node 2 (SaveImage) has no inputs"),
    "inputs are a list": ({"1": {"class_type": "SaveImage", "inputs": []}}, "node 1 (SaveImage) has no inputs"),
    "loose link": (
        {"1": NODE, "2": {"class_type": "SaveImage", "_meta": {"title": "Save"}, "inputs": {"images": ["9", 0]}}},
        "node 2 (Save) takes images from node 9, which is not there",
    ),
    "canvas without nodes": ({"nodes": [], "links": []}, "the workflow has no nodes"),
    "canvas with a node without type": ({"nodes": [{"id": 1}], "links": []}, "a node has no id or no type ({'id': 1})"),
    "canvas with a null": ({"nodes": [None], "links": []}, "a node has no id or no type (None)"),
    "canvas with other links": (
        {"nodes": [{"id": 1, "type": "A"}], "links": [{"id": 1, "origin_id": 1}]},
        "the links are in a form that is not known",
    ),
    "canvas with short links": (
        {"nodes": [{"id": 1, "type": "A"}], "links": [[1, 1, 0, 1, 0]]},
        "the links are in a form that is not known",
    ),
    "canvas with a node whose id is a list": ({"nodes": [{"id": [], "type": "A"}], "links": []}, "a node has no id"),
    "canvas with a link from a list": (
        {"nodes": [{"id": 1, "type": "A"}], "links": [[3, [], 0, 1, 0, "IMAGE"]]},
        "link 3 comes from node [], which is not there",
    ),
    "canvas with null links": ({"nodes": [{"id": 1, "type": "A"}], "links": None}, "the links are in a form"),
    "canvas with a loose link": (
        {"nodes": [{"id": 1, "type": "A"}], "links": [[3, 9, 0, 1, 0, "IMAGE"]]},
        "link 3 comes from node 9, which is not there",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES[name]
    assert expected in complaint(written(tmp_path / "workflow.json", content))


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none.json").endswith("there is no such workflow; check the path")
    assert "the workflow cannot be read: Is a directory" in complaint(tmp_path)


BAD_TEXTS = {
    "no text": ({}, "the PNG has no workflow, no text at all"),
    "another program's text": ({"parameters": "a koala, Steps: 20"}, "only the text 'parameters'"),
    "cut prompt": ({"prompt": '{"1": '}, "the text 'prompt' in the PNG is not JSON"),
    "cut workflow": ({"workflow": '{"1": '}, "the text 'workflow' in the PNG is not JSON"),
    "prompt of no nodes": ({"prompt": "{}"}, "the workflow has no nodes"),
    "workflow of no nodes": ({"workflow": '{"nodes": [], "links": []}'}, "the workflow has no nodes"),
    "workflow that is none": ({"workflow": "[]"}, "only the text 'workflow'"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_png_without_a_graph_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    texts, expected = BAD_TEXTS[name]
    assert expected in complaint(png(tmp_path / "image.png", **texts))


def test_images_of_the_repository_have_no_workflow() -> None:
    assert "the PNG has no workflow" in complaint(ROOT / "assets" / "koala-tiny-sheet.png")


@pytest.mark.parametrize("size", [8, 20, 60, 120])
def test_a_cut_png_is_refused_in_one_line(tmp_path: Path, size: int) -> None:
    path = png(tmp_path / "image.png", prompt=json.dumps({"1": NODE}))
    assert "the PNG is damaged" in complaint(written(path, path.read_bytes()[:size]))


@pytest.mark.parametrize("path", CANVASES, ids=lambda path: path.stem)
def test_a_canvas_whose_nodes_the_server_lacks_is_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    """As to_prompt words it; the same from a PNG without the graph."""
    (nodes,) = {node["type"] for node in loaded(path)["nodes"]} & {
        "KoalaCheckpointLoader",
        "CheckpointLoaderSimple",
    } or [""]
    line = complaint(path, dict)
    assert "The server has no node of class" in line
    assert nodes in line
    image = png(tmp_path / "image.png", workflow=path.read_text("utf-8"))
    assert complaint(image, dict).removeprefix(str(image)) == line.removeprefix(str(path))


def test_a_random_choice_falls_the_same_way_each_time(tmp_path: Path) -> None:
    """And the process's own random numbers go on as if nothing had been."""
    canvas = {
        "nodes": [
            {
                "id": 6,
                "type": "CLIPTextEncode",
                "title": "Prompt",
                "mode": 0,
                "widgets_values": ["a {red|green|blue} car"],
            }
        ],
        "links": [],
        "version": 0.4,
    }
    path = written(tmp_path / "workflow.json", canvas)
    texts = set()
    for start in range(20):
        random.seed(start)
        before = random.getstate()
        found = read(path, lambda: TEXT_ENCODE)
        assert found.canvas == canvas
        assert found.graph.keys() == {"6"}
        assert title(found.graph["6"]) == "Prompt"
        texts.add(found.graph["6"]["inputs"]["text"])
        assert random.getstate() == before
    assert texts < {"a red car", "a green car", "a blue car"}
    assert len(texts) == 1


def test_a_canvas_that_the_converter_cannot_read_is_refused_in_one_line(tmp_path: Path) -> None:
    primitive = {"id": 1, "type": "PrimitiveNode", "mode": 0, "outputs": [{"type": "STRING", "links": [1]}]}
    encoder = {"id": 6, "type": "CLIPTextEncode", "mode": 0, "widgets_values": ["a car"], "inputs": []}
    canvas = {"nodes": [primitive, encoder], "links": [[1, 1, 0, 6, 0, "STRING"]], "version": 0.4}
    line = complaint(written(tmp_path / "workflow.json", canvas), lambda: TEXT_ENCODE)
    assert "the workflow cannot be converted (KeyError" in line


def test_a_canvas_of_notes_alone_is_refused_in_one_line(tmp_path: Path) -> None:
    canvas = {"nodes": [{"id": 1, "type": "Note", "widgets_values": ["x"]}], "links": [], "version": 0.4}
    assert "the workflow has no nodes" in complaint(written(tmp_path / "workflow.json", canvas), lambda: TEXT_ENCODE)
