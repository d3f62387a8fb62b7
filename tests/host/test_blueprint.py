"""The blueprint in the real server: listed, served as it is in the file, and it draws what it is asked for."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
from PIL import Image

from tests.host.test_nodes import seen
from tools.generate.blueprints import FOLDER, blueprints
from tools.harness.client import Client
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


@pytest.mark.parametrize("title", sorted(FILES))
def test_it_draws_its_prompt(title: str, client: Client, object_info: dict[str, Any]) -> None:
    blueprint = json.loads(FILES[title].read_text("utf-8"))
    prompt = to_prompt(saving(blueprint), object_info)
    (image,) = client.run(prompt).images()
    assert seen(Image.open(io.BytesIO(client.view(image)))) == ("gray", "koala", "green")
