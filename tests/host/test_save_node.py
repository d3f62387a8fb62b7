"""KOALA Checkpoint Save in the real server: what is on disk after a run, and what a person reads."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from koala_sdxl.koala.files.header import read_header
from koala_sdxl.koala.files.inspect import inspect_checkpoint, inspect_folder, inspect_unet
from tests.host.test_nodes import built_in, graph, picture
from tools.harness.client import Client, GraphError, Prompt
from tools.harness.server import Server

OPTIONAL = {"clip": ["1", 1], "vae": ["1", 2]}
SAVE = "9"


def save(prefix: str, kind: str = "checkpoint", dtype: str = "default", **inputs: Any) -> Prompt:
    """koala-tiny into the saving node; ``inputs`` are its optional ones, all of them unless given."""
    return {
        "1": {"class_type": "KoalaCheckpointLoader", "inputs": {"weight_dtype": "default", **built_in()}},
        SAVE: {
            "class_type": "KoalaCheckpointSave",
            "inputs": {
                "model": ["1", 0],
                "format": kind,
                "format.filename_prefix": prefix,
                "weight_dtype": dtype,
                **(inputs or OPTIONAL),
            },
        },
    }


@pytest.fixture(scope="module")
def output(server: Server) -> Path:
    return server.base / "output"


def test_what_was_saved_is_listed_at_once_and_draws_the_same_picture(client: Client, output: Path) -> None:
    said = client.run(save("checkpoints/saved")).text(SAVE)
    assert said == "saved as checkpoints/saved_00001_.safetensors"
    again = graph({"source": "checkpoint", "source.ckpt_name": "saved_00001_.safetensors"})
    assert picture(client, again).tobytes() == picture(client, graph()).tobytes()
    assert inspect_checkpoint(output / "checkpoints" / "saved_00001_.safetensors").model.identity.certain


def test_the_name_can_be_wired_on(client: Client) -> None:
    prompt = save("wired/koala")
    prompt["10"] = {"class_type": "PreviewAny", "inputs": {"source": [SAVE, 0]}}
    assert client.run(prompt).text("10") == "wired/koala_00001_.safetensors"


def test_two_saves_are_two_files_and_the_first_is_untouched(client: Client, output: Path) -> None:
    client.run(save("twice/koala", dtype="fp16"))
    first = (output / "twice" / "koala_00001_.safetensors").read_bytes()
    client.run(save("twice/koala", dtype="bf16"))
    assert sorted(item.name for item in (output / "twice").iterdir()) == [
        "koala_00001_.safetensors",
        "koala_00002_.safetensors",
    ]
    assert (output / "twice" / "koala_00001_.safetensors").read_bytes() == first
    assert inspect_unet(output / "twice" / "koala_00002_.safetensors").dtype == "bf16"


def test_the_graph_is_in_the_file_as_in_cores(client: Client, output: Path) -> None:
    prompt = save("graph/koala")
    client.run(prompt, workflow={"nodes": [], "note": "ä"})
    metadata = read_header(output / "graph" / "koala_00001_.safetensors").metadata
    assert json.loads(metadata["prompt"])[SAVE]["inputs"]["format.filename_prefix"] == "graph/koala"
    assert json.loads(metadata["workflow"]) == {"nodes": [], "note": "ä"}
    assert metadata["modelspec.title"] == "koala_00001_"


def test_a_diffusers_folder_and_a_bare_unet(client: Client, output: Path) -> None:
    said = client.run(save("diffusers/saved", "diffusers folder", "fp16")).text(SAVE)
    assert said == "saved as diffusers/saved_00001_"
    assert inspect_folder(output / "diffusers" / "saved_00001_").model.unet.dtype == "fp16"
    client.run(save("diffusers/saved", "diffusers folder", "bf16"))
    saved = (output / "diffusers").glob("saved*")  # other tests save here, too
    assert sorted(item.name for item in saved) == ["saved_00001_", "saved_00002_"]
    bare = save("diffusion_models/saved")
    for name in OPTIONAL:
        del bare[SAVE]["inputs"][name]
    client.run(bare)
    header = read_header(output / "diffusion_models" / "saved_00001_.safetensors")
    assert all(name.startswith("model.diffusion_model.") for name in header.shapes)
    listed = client.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"][0]
    assert "saved_00001_.safetensors" in listed


def test_what_is_missing_is_said_and_nothing_is_written(client: Client, output: Path) -> None:
    with pytest.raises(GraphError, match="no VAE is connected; a diffusers folder holds") as caught:
        client.run(save("refused/koala", "diffusers folder", clip=["1", 1]))
    assert "Connect VAE" in str(caught.value).splitlines()[0]
    assert not list((output / "refused").iterdir())


def test_nothing_is_written_outside_the_output_folder(client: Client, output: Path) -> None:
    before = sorted(output.parent.iterdir())
    for prefix in ("../outside", "/tmp/outside/koala"):
        with pytest.raises(GraphError, match="outside the output folder is not allowed"):
            client.run(save(prefix))
    assert sorted(output.parent.iterdir()) == before
    assert not Path("/tmp/outside").exists()


@pytest.fixture
def small_disk(output: Path) -> Iterator[Path]:
    """A file system of eight megabytes in the output folder; only root can make one."""
    folder = output / "small"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["checkpoint", "diffusers folder"])
def test_a_full_disk_is_said_and_left_as_it_was(kind: str, client: Client, small_disk: Path) -> None:
    with pytest.raises(GraphError) as caught:
        client.run(save("small/koala", kind))
    first = str(caught.value).splitlines()[0]
    assert "no space left for koala_00001_" in first
    assert " GB needed in" in first
    assert "run again" in first
    assert not list(small_disk.iterdir())
