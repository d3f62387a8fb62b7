"""Workflows of the canvas, ComfyUI's own, become graphs that the real server finds no fault with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.harness.client import Client, GraphError
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT, Host
from tools.harness.workflow import to_prompt, with_widget

templates = pytest.importorskip("comfyui_workflow_templates_json")

# Stock graphs: SDXL with two samplers and notes, primitives, images in, a subgraph, bypassed nodes.
TEMPLATES = (
    "sdxl_simple_example",
    "sdxl_refiner_prompt_example",
    "sd3.5_large_canny_controlnet_example",
    "image_z_image_turbo",
    "image_qwen_image",
)


def template(name: str) -> dict[str, Any]:
    (file,) = Path(templates.__file__).parent.rglob(f"{name}.json")
    workflow: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return workflow


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_stock_template_lacks_nothing_but_its_model_files(
    client: Client, object_info: dict[str, Any], name: str
) -> None:
    prompt = to_prompt(template(name), object_info)
    with pytest.raises(GraphError) as caught:
        client.submit(prompt)
    faults = {
        (error["type"], error["extra_info"]["input_name"])
        for node in caught.value.errors.values()
        for error in node["errors"]
    }
    assert {kind for kind, _ in faults} <= {"value_not_in_list", "custom_validation_failed"}
    files = ("ckpt_name", "unet_name", "vae_name", "clip_name", "control_net_name", "lora_name", "image")
    assert all(place.startswith(files) for _, place in faults)


def test_a_workflow_with_our_dynamic_combos(object_info: dict[str, Any]) -> None:
    """The nested inputs follow their combo, and go when another option is chosen."""
    node = {"id": 1, "type": "KoalaSampler", "mode": 0, "inputs": [], "outputs": [], "properties": {}}
    workflow = {"nodes": [node | {"widgets_values": [7, "fixed", "auto", "euler", 1.0]}], "links": [], "version": 0.4}
    assert to_prompt(workflow, object_info)["1"]["inputs"] == {
        "seed": 7,
        "preset": "auto",
        "sampler_name": "euler",
        "denoise": 1.0,
    }
    for name, value in {"preset": "custom", "preset.steps": 12, "preset.cfg": 3.5, "seed": 9}.items():
        workflow = with_widget(workflow, object_info, "KoalaSampler", name, value)
    inputs = to_prompt(workflow, object_info)["1"]["inputs"]
    assert (inputs["seed"], inputs["preset"], inputs["preset.steps"], inputs["preset.cfg"]) == (9, "custom", 12, 3.5)
    assert (inputs["sampler_name"], inputs["denoise"]) == ("euler", 1.0)
    assert workflow.keys() == {"nodes", "links", "version"}


def test_muted_bypassed_rerouted_noted_and_primitive_nodes(object_info: dict[str, Any]) -> None:
    def node(number: int, kind: str, **rest: Any) -> dict[str, Any]:
        return {"id": number, "type": kind, "mode": 0, "properties": {}, "inputs": [], "outputs": [], **rest}

    image = {"name": "image", "type": "IMAGE"}
    width = [{"name": "width", "type": "INT", "link": 5, "widget": {"name": "width"}}]
    workflow = {
        "nodes": [
            node(
                1, "EmptyImage", widgets_values=[64, 64, 1, 0], outputs=[{"type": "IMAGE", "links": [1]}], inputs=width
            ),
            node(
                2, "Reroute", inputs=[{"name": "", "type": "*", "link": 1}], outputs=[{"type": "IMAGE", "links": [2]}]
            ),
            node(3, "ImageInvert", mode=4, inputs=[image | {"link": 2}], outputs=[{"type": "IMAGE", "links": [3, 4]}]),
            node(4, "PreviewImage", inputs=[image | {"name": "images", "link": 3}]),
            node(5, "PreviewImage", mode=2, inputs=[image | {"name": "images", "link": 4}]),
            node(6, "Note", widgets_values=["a word"]),
            node(7, "MarkdownNote", widgets_values=["a word"]),
            node(8, "PrimitiveNode", widgets_values=[96, "fixed"], outputs=[{"type": "INT", "links": [5]}]),
        ],
        "links": [
            [1, 1, 0, 2, 0, "IMAGE"],
            [2, 2, 0, 3, 0, "IMAGE"],
            [3, 3, 0, 4, 0, "IMAGE"],
            [4, 3, 0, 5, 0, "IMAGE"],
            [5, 8, 0, 1, 0, "INT"],
        ],
        "version": 0.4,
    }
    prompt = to_prompt(workflow, object_info)
    assert prompt.keys() == {"1", "4"}
    assert prompt["1"]["inputs"] == {"width": 96, "height": 64, "batch_size": 1, "color": 0}
    assert prompt["4"]["inputs"] == {"images": ["1", 0]}


def test_an_unknown_node_is_an_error(object_info: dict[str, Any]) -> None:
    node = {"id": 1, "type": "NoSuchNode", "mode": 0, "widgets_values": [1]}
    with pytest.raises(UserError, match="no node of class NoSuchNode"):
        to_prompt({"nodes": [node], "links": [], "version": 0.4}, object_info)


def test_a_workflow_can_be_changed_again_and_again(object_info: dict[str, Any]) -> None:
    """Each change starts from the workflow as it was, which stays as it is."""
    workflow = json.loads((ROOT / "example_workflows" / "01 KOALA-tiny text to image.json").read_text("utf-8"))
    for text in ("one", "two", "three", "four", "five", "six"):
        changed = with_widget(workflow, object_info, "KoalaPrompt", "positive", text)
        (encoder,) = [node for node in changed["nodes"] if node["type"] == "KoalaPrompt"]
        assert encoder["widgets_values"][0] == text
    assert workflow == json.loads((ROOT / "example_workflows" / "01 KOALA-tiny text to image.json").read_text("utf-8"))


def test_a_wrong_widget_or_value_is_an_error(object_info: dict[str, Any]) -> None:
    workflow = {
        "nodes": [{"id": 1, "type": "KoalaSampler", "widgets_values": [7, "fixed", "auto", "euler", 1.0]}],
        "links": [],
    }
    with pytest.raises(UserError, match="guidance"):
        with_widget(workflow, object_info, "KoalaSampler", "guidance", 3)
    with pytest.raises(UserError, match="no VAEDecode"):
        with_widget(workflow, object_info, "VAEDecode", "guidance", 3)


def test_comfyui_blueprints_are_converted(host: Host, object_info: dict[str, Any]) -> None:
    """Every blueprint of nodes that are there: a root node that stands for a subgraph."""
    files = sorted((host.folder / "blueprints").glob("*.json"))
    converted = 0
    for file in files:
        workflow = json.loads(file.read_text("utf-8"))
        inner = [node for graph in workflow["definitions"]["subgraphs"] for node in graph["nodes"]]
        subgraphs = {graph["id"] for graph in workflow["definitions"]["subgraphs"]}
        if {node["type"] for node in inner} - object_info.keys() - subgraphs:
            continue  # of a partner's API, which this server leaves out
        prompt = to_prompt(workflow, object_info)
        assert all(":" in node for node in prompt), file.name
        converted += 1
    assert converted > len(files) / 2
