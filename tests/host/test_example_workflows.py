"""Every shipped workflow runs in the real server; full-size ones on random weights under the published names."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from PIL import Image, ImageChops
from torchvision.transforms.functional import to_tensor

from koala_sdxl.distill.study.addon_pictures import judge_cyan
from tools.generate.workflows import FOLDER, models, shipped
from tools.harness.client import Client, Result
from tools.harness.server import Server
from tools.harness.testhost import Host
from tools.harness.workflow import to_prompt, with_widget
from tools.synthetic import random_weights
from tools.tiny.judge import judge
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES

WORKFLOWS = sorted(FOLDER.glob("*.json"))
SWAP = shipped("KOALA-700M in an SDXL graph")
"""The only one that has SDXL's own U-Net: it runs in test_transfer_nodes.py."""
TRAINING = shipped("KOALA-tiny LoRA training")
"""Takes a minute; it runs in a test of its own."""
PINK, NEARLY = torch.tensor([1.0, 0.45, 0.75]), 0.25
COMPLAINTS = ("could not be applied", "lora key not loaded", "NOT LOADED", "ERROR lora", "Traceback")
"""What ComfyUI logs where an adapter does not fit the model it is on."""
SIDE = 128  # pixels: a full-size U-Net makes it on a CPU in seconds


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


def place_files(
    workflow: dict[str, Any], server: Server, host: Host, file: Callable[[dict[str, str]], Path] = random_file
) -> None:
    """Put a file where each of the workflow's would go, ``file`` in a download's place, and the picture that ComfyUI
    comes with."""
    for model in models(workflow):
        target = server.base / "models" / model["directory"] / model["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(file(model))
    picture = server.base / "input" / "example.png"
    if not picture.exists():
        shutil.copyfile(host.folder / "input" / picture.name, picture)


def shortened(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The same graph with two steps at a small size, and its KOALA kept in half the memory."""
    types = {node["type"] for node in workflow["nodes"]}
    for name in {"KoalaCheckpointLoader", "KoalaUNetSwap"} & types:
        workflow = with_widget(workflow, info, name, "weight_dtype", "fp16")
    for name in ("width", "height"):
        workflow = with_widget(workflow, info, "EmptyLatentImage", name, SIDE)
    for name in ("KoalaScheduler", "KSampler"):
        if name in types:
            return with_widget(workflow, info, name, "steps", 2)
    workflow = with_widget(workflow, info, "KoalaSampler", "preset", "custom")
    return with_widget(workflow, info, "KoalaSampler", "preset.steps", 2)


def named(paths: Iterable[Any]) -> Any:
    return pytest.mark.parametrize("path", list(paths), ids=lambda path: path.stem)


@named(path for path in WORKFLOWS if "tiny" in path.stem and path != TRAINING)
def test_a_shipped_workflow_runs(path: Path, server: Server, client: Client, host: Host) -> None:
    require_run(read(path), server, client, host)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
@named(path for path in WORKFLOWS if "tiny" not in path.stem and path != SWAP)
def test_a_shipped_workflow_of_a_full_size_model_runs(path: Path, server: Server, client: Client, host: Host) -> None:
    """By day tools/check/gates.py holds their graphs against the nodes' schemas, and those of koala-tiny run."""
    require_run(read(path), server, client, host)


def read(path: Path) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return workflow


def require_run(
    workflow: dict[str, Any],
    server: Server,
    client: Client,
    host: Host,
    file: Callable[[dict[str, str]], Path] = random_file,
) -> list[Image.Image]:
    """A workflow, with files in the place of its downloads, draws pictures, and nothing is complained of.

    Returns what it saves, in the order of its nodes.
    """
    side = 128
    said_before = len(server.log.read_bytes())
    place_files(workflow, server, host, file)
    object_info = client.object_info()  # lists the new files
    if models(workflow):
        workflow, side = shortened(workflow, object_info), SIDE
    result = client.run(to_prompt(workflow, object_info), workflow)
    pictures = saved_pictures(result, client)
    assert pictures
    for picture in pictures:
        assert picture.size == (side, side)
        assert json.loads(picture.info["workflow"]) == workflow
    said = server.log.read_bytes()[said_before:].decode("utf-8", "replace")
    assert not any(complaint in said for complaint in COMPLAINTS), said
    return pictures


def saved_pictures(result: Result, client: Client) -> list[Image.Image]:
    """What a run saved, in the order of its nodes; previews are not saved."""
    nodes = sorted((node for node in result.outputs if result.images(node)), key=int)
    saved = (image for node in nodes for image in result.images(node) if image.type == "output")
    return [Image.open(io.BytesIO(client.view(image))) for image in saved]


def tiny_pictures(name: str, server: Server, client: Client, host: Host) -> torch.Tensor:
    """What a workflow on koala-tiny draws, in the order of its nodes: float32 [n, 3, 128, 128] in [-1, 1]."""
    workflow = read(shipped(name))
    place_files(workflow, server, host)
    result = client.run(to_prompt(workflow, client.object_info()))
    return torch.stack([to_tensor(picture.convert("RGB")) for picture in saved_pictures(result, client)]) * 2 - 1


def test_the_lora_of_the_larger_model_teaches_koala_tiny_cyan(server: Server, client: Client, host: Host) -> None:
    seen = judge_cyan(tiny_pictures("KOALA-tiny with a LoRA", server, client, host))
    assert seen.cyan.all()
    assert [SHAPE_NAMES[shape] for shape in seen.shape] == ["triangle"]


def test_the_controlnet_of_the_larger_model_keeps_koala_tinys_shape(server: Server, client: Client, host: Host) -> None:
    seen = judge(tiny_pictures("KOALA-tiny with a ControlNet", server, client, host))
    assert [SHAPE_NAMES[shape] for shape in seen.shape] == ["star", "star"]
    assert [COLOUR_NAMES[colour] for colour in seen.background] == ["black", "blue"]


def pink_share(picture: Image.Image) -> float:
    """Share of a picture's pixels that are nearly pink."""
    distance = (to_tensor(picture.convert("RGB")).movedim(0, -1) - PINK).norm(dim=-1)
    return float((distance < NEARLY).float().mean())


@pytest.mark.nightly
def test_a_lora_is_trained_on_the_canvas_and_teaches_koala_tiny(server: Server, client: Client, host: Host) -> None:
    workflow = read(TRAINING)
    before, after = require_run(workflow, server, client, host)
    assert pink_share(before) < 0.01
    assert pink_share(after) > 0.05
    # the file it leaves, by KOALA LoRA Loader: the same picture
    (file,) = (server.base / "output" / "loras").glob("koala-tiny-pink_80_steps_*.safetensors")
    prompt = to_prompt(workflow, client.object_info())
    (core,) = [node for node in prompt.values() if node["class_type"] == "LoraModelLoader"]
    loader = core["inputs"]["model"][0]
    core["class_type"] = "KoalaLoraLoader"
    core["inputs"] = {"model": [loader, 0], "clip": [loader, 1], "lora_name": file.name, "trained_on": "auto"}
    core["inputs"] |= {"strength_model": 1.0, "strength_clip": 1.0, "fold_removed": 0.0}
    (number,) = [key for key, node in prompt.items() if node is core]
    for kind in ("TrainLoraNode", "SaveLoRA", "LossGraphNode", "PreviewImage"):
        prompt = {key: node for key, node in prompt.items() if node["class_type"] != kind}
    result = client.run(prompt)
    assert "U-Net on koala-tiny: 355 applied" in result.text(number).splitlines()  # and no other outcome
    _, by_ours = saved_pictures(result, client)
    assert ImageChops.difference(by_ours.convert("RGB"), after.convert("RGB")).getbbox() is None


def test_workflows_cover_what_the_pack_promises() -> None:
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text("utf-8"))["nodes"]}
    assert {"KoalaCheckpointLoader", "KoalaModelInfo", "KoalaPrompt", "KoalaScheduler", "KoalaSampler"} <= used
    assert {"KoalaAccelerate", "KoalaUNetSwap", "KoalaLoraLoader", "KoalaControlNet"} <= used
