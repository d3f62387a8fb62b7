"""A file that changes on disk between two runs of the same graph, in the real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.host.test_nodes import graph, picture
from tests.host.test_save_node import save
from tools.harness.client import Client
from tools.harness.server import Server


@pytest.fixture(scope="module")
def folder(client: Client, server: Server) -> Path:
    """koala-tiny as a diffusers folder that the loader lists."""
    client.run(save("diffusers/changed", "diffusers folder", "fp16"))
    return server.base / "output" / "diffusers" / "changed_00001_"


def _replace_unet(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: 0.9 * tensor for name, tensor in load_file(path).items()}
    save_file(weights, path.with_name("new"), {"format": "pt"})
    path.with_name("new").replace(path)


def _overwrite_vae(folder: Path) -> None:
    """In place, as ``cp`` and ``curl -o`` do."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: 0.9 * tensor for name, tensor in load_file(path).items()}
    save_file(weights, path.with_name("new"), {"format": "pt"})
    path.write_bytes(path.with_name("new").read_bytes())


def _change_schedule(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps_offset": 0}))


@pytest.mark.parametrize("change", [_replace_unet, _overwrite_vae, _change_schedule])
def test_the_next_run_has_the_new_file(change: Callable[[Path], None], client: Client, folder: Path) -> None:
    prompt = graph({"source": "diffusers folder", "source.folder": folder.name})
    before = picture(client, prompt).tobytes()
    assert picture(client, prompt).tobytes() == before
    change(folder)
    assert picture(client, prompt).tobytes() != before
