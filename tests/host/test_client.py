"""The client against the real server."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from PIL import Image

from tools.harness.client import Client, GraphError, Interrupted

EMPTY: dict[str, Any] = {
    "class_type": "EmptyImage",
    "inputs": {"width": 64, "height": 32, "batch_size": 2, "color": 0xFF0000},
}


def preview(node: str) -> dict[str, Any]:
    return {"class_type": "PreviewImage", "inputs": {"images": [node, 0]}}


def test_a_graph_runs_and_its_pictures_carry_it(client: Client) -> None:
    graph = {"1": EMPTY, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "red"}}}
    workflow = {"nodes": [], "links": [], "version": 0.4}
    seen: list[str] = []
    result = client.run(graph, workflow, lambda kind, _: seen.append(kind))
    assert seen[0] == "execution_start"
    assert {"executing", "executed", "execution_success"} <= set(seen)
    first, second = result.images("2")
    assert (first.type, second.filename) == ("output", "red_00002_.png")
    picture = Image.open(io.BytesIO(client.view(first)))
    assert picture.getpixel((0, 0)) == (255, 0, 0)
    assert json.loads(picture.info["prompt"]).keys() == graph.keys()
    assert json.loads(picture.info["workflow"]) == workflow
    assert client.history(result.prompt_id)["status"]["completed"]


def test_a_refused_graph_says_which_input_of_which_node(client: Client) -> None:
    graph = {"7": {"class_type": "EmptyImage", "inputs": {**EMPTY["inputs"], "width": -1}}, "8": preview("7")}
    with pytest.raises(GraphError, match=r"(?s)node 7 \(EmptyImage\).*width") as caught:
        client.run(graph)
    assert caught.value.errors["7"]["errors"][0]["type"] == "value_smaller_than_min"


def test_one_faulty_output_of_two_is_an_error_too(client: Client) -> None:
    graph = {"1": EMPTY, "2": preview("1"), "3": {"class_type": "PreviewImage", "inputs": {}}}
    with pytest.raises(GraphError, match=r"node 3 \(PreviewImage\)"):
        client.run(graph)


def test_a_node_that_fails_is_named_with_its_error(client: Client) -> None:
    name = client.upload("broken.png", b"this is no picture")
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": name}}, "2": preview("1")}
    with pytest.raises(GraphError, match=r"(?s)broken\.png.*in node 1 \(LoadImage\)") as caught:
        client.run(graph)
    assert caught.value.errors["1"]["exception_type"]


def test_an_uploaded_picture_can_be_loaded(client: Client) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(file, "PNG")
    name = client.upload("blue.png", file.getvalue())
    result = client.run({"1": {"class_type": "LoadImage", "inputs": {"image": name}}, "2": preview("1")})
    (image,) = result.images()
    assert Image.open(io.BytesIO(client.view(image))).getpixel((4, 4)) == (0, 0, 255)


def test_a_cancelled_run_raises(client: Client) -> None:
    graph = {"1": {"class_type": "EmptyImage", "inputs": {**EMPTY["inputs"], "width": 128}}, "2": preview("1")}

    def cancel(kind: str, data: dict[str, Any]) -> None:
        if kind == "execution_start":
            client.interrupt()

    inputs = {"image": ["1", 0], "blur_radius": 31, "sigma": 10.0}
    blurred: dict[str, Any] = {"class_type": "ImageBlur", "inputs": inputs}
    graph |= {str(node): blurred | {"inputs": {**blurred["inputs"], "sigma": node / 10}} for node in range(3, 60)}
    graph |= {str(node): preview(str(node - 100)) for node in range(103, 160)}
    with pytest.raises(Interrupted):
        client.run(graph, on_event=cancel)


def test_what_was_computed_is_let_go(client: Client) -> None:
    graph = {"1": {"class_type": "EmptyImage", "inputs": {**EMPTY["inputs"], "width": 72}}, "2": preview("1")}

    def computed() -> bool:
        seen: list[object] = []
        client.run(graph, on_event=lambda kind, data: seen.append(data.get("node") if kind == "executing" else None))
        return "1" in seen

    assert computed()
    assert not computed()
    client.free()  # the server does so between two graphs, at the latest after the next one
    assert any(computed() for _ in range(3))


def test_no_server_is_a_connection_error() -> None:
    with pytest.raises(ConnectionError):
        Client("http://127.0.0.1:9").object_info()
