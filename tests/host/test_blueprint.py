"""The blueprint in the real server: listed, served as it is in the file, and it draws what it is asked for."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
from PIL import Image

from tests.host.test_example_workflows import SIDE, place_files
from tests.host.test_nodes import seen
from tools.generate.blueprints import FOLDER, blueprints
from tools.harness.client import Client
from tools.harness.server import Server
from tools.harness.testhost import Host
from tools.harness.workflow import to_prompt

FILES = {path.stem: path for path in FOLDER.glob("*.json")}


def saving(blueprint: dict[str, Any]) -> dict[str, Any]:
    """The blueprint on an empty canvas, its picture saved."""
    workflow = copy.deepcopy(blueprint)
    (root,) = workflow["nodes"]
    save = root["id"] + 1
    link = [1, root["id"], 0, save, 0, "IMAGE"]
    images = {"name": "images", "type": "IMAGE", "link": 1}
    root["outputs"][0]["links"] = [1]
    workflow["nodes"].append(
        {"id": save, "type": "SaveImage", "mode": 0, "inputs": [images], "outputs": [], "widgets_values": ["blueprint"]}
    )
    workflow["links"].append(link)
    return workflow


def test_the_host_lists_and_serves_it(client: Client) -> None:
    listed = client.get("/global_subgraphs")
    own = {
        entry["name"]: key for key, entry in listed.items() if entry["info"]["node_pack"] == "custom_nodes.koala-sdxl"
    }
    assert own.keys() == FILES.keys() == blueprints().keys()
    for title, key in own.items():
        assert client.get(f"/global_subgraphs/{key}")["data"] == FILES[title].read_text("utf-8")


def test_the_tiny_one_draws_its_prompt(client: Client, object_info: dict[str, Any]) -> None:
    blueprint = json.loads(FILES["KOALA-tiny text to image"].read_text("utf-8"))
    prompt = to_prompt(saving(blueprint), object_info)
    (image,) = client.run(prompt).images()
    assert seen(Image.open(io.BytesIO(client.view(image)))) == ("gray", "koala", "green")


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
def test_the_published_one_draws_with_its_files(server: Server, client: Client, host: Host) -> None:
    blueprint = json.loads(FILES["KOALA text to image"].read_text("utf-8"))
    (inner,) = blueprint["definitions"]["subgraphs"]
    place_files(inner, server, host)
    prompt = to_prompt(saving(blueprint), client.object_info())
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    nodes["KoalaCheckpointLoader"]["weight_dtype"] = "fp16"
    nodes["EmptyLatentImage"] |= {"width": SIDE, "height": SIDE}
    two_steps = {"preset.steps": 2, "preset.cfg": 3.5, "preset.spacing": "trailing"}
    nodes["KoalaSampler"] |= {"preset": "custom", **two_steps}
    (image,) = client.run(prompt).images()
    assert Image.open(io.BytesIO(client.view(image))).size == (SIDE, SIDE)
