"""Every shipped workflow runs in the real server; full-size ones on random weights under the published names."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from PIL import Image

from tools import random_weights
from tools.client import Client
from tools.server import Server
from tools.testhost import ROOT
from tools.workflow import to_prompt, with_widget

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
SIDE = 256  # pixels: a full-size U-Net makes it on a CPU in seconds


def models(workflow: dict[str, Any]) -> list[dict[str, str]]:
    """The downloads that the workflow offers."""
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]


def place_random_weights(workflow: dict[str, Any], server: Server) -> None:
    """Put a random file where each of the workflow's downloads would go."""
    for model in models(workflow):
        published = Path(urlparse(model["url"]).path)  # .../<repository>/resolve/main/<part>/<file>
        source = random_weights.folder("koala-700m") / published.parent.name / published.name
        target = server.base / "models" / model["directory"] / model["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(source)


def shortened(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The same graph with two steps at a small size."""
    types = {node["type"] for node in workflow["nodes"]}
    for name in ("width", "height"):
        workflow = with_widget(workflow, info, "EmptyLatentImage", name, SIDE)
    if "KoalaScheduler" in types:
        return with_widget(workflow, info, "KoalaScheduler", "steps", 2)
    workflow = with_widget(workflow, info, "KoalaSampler", "preset", "custom")
    return with_widget(workflow, info, "KoalaSampler", "preset.steps", 2)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if "tiny" in path.stem else pytest.mark.slow, id=path.stem) for path in WORKFLOWS],
)
def test_a_shipped_workflow_runs(path: Path, server: Server, client: Client, object_info: dict[str, Any]) -> None:
    workflow = json.loads(path.read_text("utf-8"))
    side = 128
    if models(workflow):
        place_random_weights(workflow, server)
        object_info = client.object_info()  # lists the new files
        workflow, side = shortened(workflow, object_info), SIDE
    result = client.run(to_prompt(workflow, object_info), workflow)
    pictures = [Image.open(io.BytesIO(client.view(image))) for image in result.images()]
    assert pictures
    for picture in pictures:
        assert picture.size == (side, side)
        assert json.loads(picture.info["workflow"]) == workflow


def test_workflows_cover_what_the_pack_promises() -> None:
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text("utf-8"))["nodes"]}
    assert {"KoalaCheckpointLoader", "KoalaModelInfo", "KoalaPrompt", "KoalaScheduler", "KoalaSampler"} <= used
