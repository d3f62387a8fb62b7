"""Every shipped workflow runs in the real server; full-size ones on random weights under the published names."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from PIL import Image

from tools import random_weights
from tools.client import Client
from tools.server import Server
from tools.testhost import ROOT, Host
from tools.workflow import to_prompt, with_widget
from tools.workflows import models

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
COMPLAINTS = ("could not be applied", "lora key not loaded", "NOT LOADED", "ERROR lora", "Traceback")
"""What ComfyUI logs where an adapter does not fit the model it is on."""
SIDE = 256  # pixels: a full-size U-Net makes it on a CPU in seconds


SDXL = {
    "checkpoints": random_weights.sdxl_checkpoint,
    "loras": random_weights.sdxl_lora,
    "controlnet": random_weights.sdxl_controlnet,
}
"""Folder -> the random file that stands in for what is published of SDXL's."""


def random_file(model: dict[str, str]) -> Path:
    """A file with random weights in the place of a published one."""
    if model["directory"] in SDXL:
        return SDXL[model["directory"]]()
    published = Path(urlparse(model["url"]).path)  # .../<repository>/resolve/main/<part>/<file>
    return random_weights.folder("koala-700m") / published.parent.name / published.name


def place_files(workflow: dict[str, Any], server: Server, host: Host) -> None:
    """Put a random file where each of the workflow's downloads would go, and the picture that ComfyUI comes with."""
    for model in models(workflow):
        target = server.base / "models" / model["directory"] / model["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(random_file(model))
    picture = server.base / "input" / "example.png"
    if not picture.exists():
        shutil.copyfile(host.folder / "input" / picture.name, picture)


def shortened(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The same graph with two steps at a small size."""
    types = {node["type"] for node in workflow["nodes"]}
    for name in ("width", "height"):
        workflow = with_widget(workflow, info, "EmptyLatentImage", name, SIDE)
    for name in ("KoalaScheduler", "KSampler"):
        if name in types:
            return with_widget(workflow, info, name, "steps", 2)
    workflow = with_widget(workflow, info, "KoalaSampler", "preset", "custom")
    return with_widget(workflow, info, "KoalaSampler", "preset.steps", 2)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if "tiny" in path.stem else pytest.mark.slow, id=path.stem) for path in WORKFLOWS],
)
def test_a_shipped_workflow_runs(
    path: Path, server: Server, client: Client, host: Host, object_info: dict[str, Any]
) -> None:
    workflow = json.loads(path.read_text("utf-8"))
    side = 128
    said_before = len(server.log.read_bytes())
    if models(workflow):
        place_files(workflow, server, host)
        object_info = client.object_info()  # lists the new files
        workflow, side = shortened(workflow, object_info), SIDE
    result = client.run(to_prompt(workflow, object_info), workflow)
    pictures = [Image.open(io.BytesIO(client.view(image))) for image in result.images()]
    assert pictures
    for picture in pictures:
        assert picture.size == (side, side)
        assert json.loads(picture.info["workflow"]) == workflow
    said = server.log.read_bytes()[said_before:].decode("utf-8", "replace")
    assert not any(complaint in said for complaint in COMPLAINTS), said


def test_workflows_cover_what_the_pack_promises() -> None:
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text("utf-8"))["nodes"]}
    assert {"KoalaCheckpointLoader", "KoalaModelInfo", "KoalaPrompt", "KoalaScheduler", "KoalaSampler"} <= used
    assert {"KoalaAccelerate", "KoalaUNetSwap", "KoalaLoraLoader", "KoalaControlNet"} <= used
