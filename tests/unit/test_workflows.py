"""The shipped workflow files: as generated, well formed, laid out, and in step with what docs/weights.md says."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
from PIL import Image, ImageStat

from koala_sdxl.koala.releases import RELEASES, identify
from tools.generate import blueprints
from tools.generate.__main__ import GENERATORS
from tools.generate.canvas import SCHEMAS, Node
from tools.generate.notes import LICENCE, MEGABYTES, size
from tools.generate.workflows import FOLDER, graphs, workflows
from tools.harness.testhost import ROOT

FILES = {path.stem: path for path in FOLDER.glob("*.json")}
WEIGHTS_PAGE = (ROOT / "docs" / "weights.md").read_text("utf-8")
TITLE_HEIGHT = 30  # pixels that a node's title stands above its position
MODEL_FOLDERS = {"diffusion_models", "text_encoders", "vae", "checkpoints", "loras", "controlnet"}


@pytest.fixture(params=sorted(FILES))
def workflow(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FILES[request.param].read_text("utf-8"))
    return loaded


@pytest.mark.parametrize("name", [name for name, generator in GENERATORS.items() if not generator.needs_server])
def test_generated_files_are_up_to_date(name: str) -> None:
    """If this fails: `python3 dev.py generate`."""
    assert GENERATORS[name].check() == []


def test_links_agree_with_the_slots_at_both_ends(workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, socket, kind in workflow["links"]:
        start, end = nodes[source]["outputs"][output], nodes[target]["inputs"][socket]
        assert number in start["links"]
        assert number == end["link"]
        assert start["type"] == end["type"] == kind
    ends = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    starts = [link for node in nodes.values() for slot in node["outputs"] for link in slot["links"]]
    assert sorted(ends) == sorted(starts) == list(range(1, workflow["last_link_id"] + 1))


def test_every_slot_without_a_widget_is_fed(workflow: dict[str, Any]) -> None:
    for node in workflow["nodes"]:
        assert all(slot["link"] for slot in node["inputs"] if "widget" not in slot)


def test_nodes_stand_apart_and_links_run_to_the_right_or_down(workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for one, other in combinations(nodes.values(), 2):
        left, right = sorted((one, other), key=lambda node: node["pos"][0])
        upper, lower = sorted((one, other), key=lambda node: node["pos"][1])
        assert (
            left["pos"][0] + left["size"][0] < right["pos"][0]
            or upper["pos"][1] + upper["size"][1] < lower["pos"][1] - TITLE_HEIGHT
        )
    for _, source, _, target, _, _ in workflow["links"]:
        assert nodes[source]["pos"] < nodes[target]["pos"]


def test_nodes_name_the_pack_that_brings_them(workflow: dict[str, Any]) -> None:
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":  # the canvas's own
            continue
        expected = "koala-sdxl" if node["type"].startswith("Koala") else "comfy-core"
        assert (node["properties"]["Node name for S&R"], node["properties"]["cnr_id"]) == (node["type"], expected)


def test_downloads_are_what_the_widgets_ask_for(workflow: dict[str, Any]) -> None:
    """The host matches by name, exactly; it offers only these suffixes, from addresses such as this."""
    for node in workflow["nodes"]:
        models = node["properties"].get("models", [])
        files = [value for value in node["widgets_values"] if str(value).endswith(".safetensors")]
        assert [model["name"] for model in models] == files
        for model in models:
            owner, repository, path = model["url"].removeprefix("https://huggingface.co/").split("/", 2)
            assert owner != "etri-vilab" or repository in {release.name for release in RELEASES}
            assert path.startswith("resolve/main/")
            assert model["directory"] in MODEL_FOLDERS


def test_notes_link_every_download_with_size_folder_total_and_licence(workflow: dict[str, Any]) -> None:
    notes = "".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    models = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    for model in models:
        megabytes = size(MEGABYTES[model["name"]])
        assert f"- [{model['name']}]({model['url']}), {megabytes}\n" in notes
        assert any(f"| {megabytes} |" in line for line in WEIGHTS_PAGE.splitlines() if f"| {model['name']} |" in line)
        assert re.search(rf"── {model['directory']}/\n(.*\n)*?.*── {re.escape(model['name'])}\n", notes)
    total = sum(MEGABYTES[model["name"]] for model in models) / 1000
    assert re.findall(r"Total: \*\*([\d.]+) GB", notes) == ([f"{round(total, 1):g}"] if models else [])
    assert (LICENCE in notes) == bool(models)
    assert ("Apache-2.0" in notes) != bool(models)


def test_what_runs_at_once_comes_first_by_name() -> None:
    titles = list(workflows())
    assert titles == sorted(titles)
    assert [title.split(" ", 1)[1] for title in titles] == list(graphs())
    assert titles[0] == "01 KOALA-tiny text to image"


def test_the_names_of_u_nets_tell_their_variant() -> None:
    for release in RELEASES:
        identity = identify({}, {}, "", f"{release.name}.fp16.safetensors")
        assert (identity.variant, identity.certain) == (release.variant, True)


def test_the_weights_page_lists_every_workflow_and_every_file(workflow: dict[str, Any]) -> None:
    assert all(f"| {title} |" in WEIGHTS_PAGE for title in FILES)
    for model in (model for node in workflow["nodes"] for model in node["properties"].get("models", [])):
        assert f"| {model['name']} |" in WEIGHTS_PAGE
        part = model["url"].split("/resolve/main/")[1]
        assert part in WEIGHTS_PAGE
        if part.startswith("unet/"):
            assert model["url"] in WEIGHTS_PAGE


def test_the_weights_page_has_every_release_under_a_name_that_is_recognised() -> None:
    for release in RELEASES:
        url = release.url("unet/diffusion_pytorch_model.fp16.safetensors")
        assert any(url in line and f"| {release.name}.fp16.safetensors |" in line for line in WEIGHTS_PAGE.splitlines())


def test_every_node_has_a_help_page() -> None:
    own = {
        name
        for path in (ROOT / "nodes").glob("*.py")
        for name in re.findall(r'node_id="(\w+)"', path.read_text("utf-8"))
    }
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == own
    assert {name for name in SCHEMAS if name.startswith("Koala")} <= own


@pytest.mark.parametrize("title", sorted(FILES))
def test_every_workflow_has_its_picture(title: str) -> None:
    """The canvas shows it in a square; the host knows only this name."""
    path = FILES[title].with_suffix(".jpg")
    assert path.stat().st_size < 40_000
    with Image.open(path) as picture:
        assert (picture.format, picture.width) == ("JPEG", picture.height)
        assert min(ImageStat.Stat(picture).stddev) > 10  # something is to be seen


def test_a_blueprint_is_one_node_that_stands_for_its_subgraph() -> None:
    for title, blueprint in blueprints.blueprints().items():
        (root,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
        assert (root["type"], root["title"], inner["name"]) == (inner["id"], title, title)
        assert [(slot["name"], slot["type"]) for slot in root["outputs"]] == [("IMAGE", "IMAGE")]
        nodes = {node["id"]: node for node in inner["nodes"]}
        for number, widget in root["properties"]["proxyWidgets"]:
            kinds = {slot["name"]: slot["type"] for slot in nodes[int(number)]["inputs"] if "widget" in slot}
            assert not kinds[widget].startswith("COMFY_DYNAMIC")  # which brings no further widgets out here
        for link in inner["links"]:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
            if link["target_id"] == inner["outputNode"]["id"]:
                assert inner["outputs"][link["target_slot"]]["linkIds"] == [link["id"]]
            else:
                assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]


@pytest.mark.parametrize("inputs", [{}, {"model": 1}, {"modle": 1}])
def test_a_slot_left_open_or_misspelt_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"KoalaModelInfo is given .* it has the slots model"):
        Node("KoalaModelInfo", inputs)
