"""Every ComfyUI release that the pack is for: no warning about it, and the same pictures to the pixel.

The older releases run in the newest one's environment, that is, with newer packages than they came with.
"""

from __future__ import annotations

import io
import re
import tomllib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from PIL import Image, ImageChops
from safetensors.torch import save_file

from tests.host.test_example_workflows import COMPLAINTS
from tests.host.test_nodes import graph, seen
from tests.host.test_speed_node import AS_BALANCED, accelerated
from tests.learn_graph import require_learned
from tests.small_sdxl import nodes_of_tests
from tools.harness.client import Client, Prompt
from tools.harness.server import Server, running
from tools.harness.testhost import RELEASES, ROOT, TESTED_RELEASE, pinned_host
from tools.synthetic import adapters

OLDER = [release for release in RELEASES if release != TESTED_RELEASE]
FILE = "releases-small.safetensors"
LORA = {"lora_name": FILE, "strength_model": 1.0, "strength_clip": 1.0, "trained_on": "auto"}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def with_lora() -> Prompt:
    prompt = graph()
    prompt["10"] = node("KoalaLoraLoader", model=["1", 0], clip=["1", 1], fold_removed=0.0, **LORA)
    prompt["2"]["inputs"]["clip"] = ["10", 1]
    prompt["4"]["inputs"]["model"] = ["10", 0]
    return prompt


def with_hooks() -> Prompt:
    prompt = graph()
    prompt["10"] = node("KoalaHookLora", model=["1", 0], **LORA | {"strength_model": 0.5})
    prompt["11"] = node("SetClipHooks", clip=["1", 1], hooks=["10", 0], apply_to_conds=True, schedule_clip=False)
    prompt["2"]["inputs"]["clip"] = ["11", 0]
    return prompt


def with_controlnet() -> Prompt:
    prompt = graph()
    prompt["10"] = node("ControlNetLoader", control_net_name=FILE)
    prompt["11"] = node("KoalaControlNet", control_net=["10", 0])
    prompt["12"] = node("EmptyImage", width=128, height=128, batch_size=1, color=0xFF0000)
    prompt["13"] = node(
        "ControlNetApplyAdvanced",
        positive=["2", 0],
        negative=["2", 1],
        control_net=["11", 0],
        image=["12", 0],
        strength=0.5,
        start_percent=0.0,
        end_percent=1.0,
    )
    prompt["4"]["inputs"] |= {"positive": ["13", 0], "negative": ["13", 1]}
    return prompt


def with_patches() -> Prompt:
    prompt = graph()
    shrink = {"downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35, "downscale_after_skip": True}
    methods = {"downscale_method": "bicubic", "upscale_method": "bicubic"}
    prompt["10"] = node("PatchModelAddDownscale", model=["1", 0], block_number=4, **shrink, **methods)
    prompt["11"] = node("KoalaAttentionPatches", model=["10", 0])
    prompt["4"]["inputs"]["model"] = ["11", 0]
    return prompt


def with_extrapolated_steps() -> Prompt:
    """By ComfyUI's own routines: which others are faster each server measures anew."""
    return accelerated(AS_BALANCED | {"preset.cpu_routines": "off"})


def with_core_sampler() -> Prompt:
    prompt = graph()
    prompt["10"] = node("KoalaScheduler", model=["1", 0], steps=25, spacing="trailing", denoise=1.0)
    prompt["11"] = node("KSamplerSelect", sampler_name="euler")
    prompt["4"] = node(
        "SamplerCustom",
        model=["1", 0],
        add_noise=True,
        noise_seed=5,
        cfg=7.5,
        positive=["2", 0],
        negative=["2", 1],
        sampler=["11", 0],
        sigmas=["10", 0],
        latent_image=["3", 0],
    )
    return prompt


def saving() -> Prompt:
    """A LoRA baked in and saved; Model Info beside it."""
    lora = with_lora()
    wires = {"model": ["10", 0], "clip": ["10", 1], "vae": ["1", 2]}
    target = {"format": "checkpoint", "format.filename_prefix": "checkpoints/releases", "weight_dtype": "default"}
    return {
        **{key: lora[key] for key in ("1", "10")},
        "20": node("KoalaCheckpointSave", **wires, **target),
        "21": node("KoalaModelInfo", model=["10", 0]),
    }


GRAPHS = {
    "text to image": graph,
    "KOALA Accelerate": with_extrapolated_steps,
    "LoRA": with_lora,
    "hooks": with_hooks,
    "ControlNet": with_controlnet,
    "patches": with_patches,
    "SamplerCustom": with_core_sampler,
}


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small SDXL LoRA and ControlNet: folder key -> file."""
    files = {key: tmp_path_factory.mktemp(key) / FILE for key in ("loras", "controlnet")}
    save_file(adapters.lora(adapters.SMALL_SDXL, only=adapters.in_attention), files["loras"])
    save_file(adapters.controlnet(), files["controlnet"])
    return files


def place(server: Server, files: dict[str, Path]) -> None:
    for key, file in files.items():
        target = server.base / "models" / key / FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(file)


def pictures(server: Server, files: dict[str, Path]) -> dict[str, Image.Image]:
    """What each graph draws on a server."""
    place(server, files)
    client = Client(server.url)
    return {name: picture(client, made()) for name, made in GRAPHS.items()}


def picture(client: Client, prompt: Prompt) -> Image.Image:
    (image,) = client.run(prompt).images()
    return Image.open(io.BytesIO(client.view(image))).convert("RGB")


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


@pytest.fixture(scope="module")
def wanted(server: Server, adapter_files: dict[str, Path]) -> dict[str, Image.Image]:
    """The pictures of the release that everything else is tested with."""
    return pictures(server, adapter_files)


def about_us(log: str) -> list[str]:
    """The lines of a server's log that name the pack, but for those that say how long its import took, and what KOALA
    Accelerate has left out."""
    log = re.sub(r"koala-comfyui-\w+|comfyui-koala", "", log)  # the folders that it runs in
    lines = [line for line in log.splitlines() if "koala" in line.lower()]
    said = (
        r"\d seconds: \S*custom_nodes/koala-sdxl$|"
        r"KOALA Accelerate: \d+ of \d+ passes ran the full U-Net, \d+ with guidance"
        r"(: \d+ of them as the features changed too fast to extrapolate)?$"
    )
    return [line for line in lines if not re.search(said, line)]


@pytest.mark.nightly
def test_all_graphs_draw_something_else(wanted: dict[str, Image.Image]) -> None:
    assert [pair for pair in combinations(wanted, 2) if same(*(wanted[name] for name in pair))] == []


@pytest.fixture(
    scope="module",
    params=OLDER,
)
def older(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of an older release."""
    with running(pinned_host(request.param)) as started:
        assert Client(started.url).get("/system_stats")["system"]["comfyui_version"] == request.param
        yield started


@pytest.mark.slow
@pytest.mark.nightly
def test_an_older_release_has_every_node(older: Server, object_info: dict[str, dict[str, Any]]) -> None:
    def inputs(info: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {name: node["input_order"] for name, node in info.items() if name.startswith("Koala")}

    assert inputs(object_info)
    assert inputs(Client(older.url).object_info()) == inputs(object_info)


@pytest.mark.slow
@pytest.mark.nightly
def test_an_older_release_gives_the_same_pictures_and_no_warning(
    older: Server, wanted: dict[str, Image.Image], adapter_files: dict[str, Path]
) -> None:
    booted = older.log.read_text("utf-8", "replace")
    assert "custom_nodes/koala-sdxl" in booted
    drawn = pictures(older, adapter_files)
    log = older.log.read_text("utf-8", "replace")
    assert about_us(log) == []
    assert not [word for word in COMPLAINTS if word in log[len(booted) :]]
    assert [name for name in wanted if not same(drawn[name], wanted[name])] == []


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_an_older_release_runs_by_faster_routines(preset: str, older: Server) -> None:
    assert seen(picture(Client(older.url), accelerated({"preset": preset}))) == ("red", "circle", "blue")


@pytest.mark.slow
@pytest.mark.nightly
def test_what_an_older_release_saves_gives_the_same_picture(
    older: Server, wanted: dict[str, Image.Image], adapter_files: dict[str, Path]
) -> None:
    client = Client(older.url)
    place(older, adapter_files)
    client.run(saving())
    (saved,) = [name for name in client.get("/models/checkpoints") if name.startswith("releases")]
    assert same(picture(client, graph({"source": "checkpoint", "source.ckpt_name": saved})), wanted["LoRA"])


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("release", OLDER)
def test_an_older_release_learns_a_lora_from_sdxl(
    release: str, adapter_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By day in the newest: tests/browser/test_learn.py."""
    nodes = nodes_of_tests(tmp_path_factory)
    with running(pinned_host(release), model_folders={"custom_nodes": [nodes]}) as started:
        (started.base / "models" / "loras").mkdir(parents=True, exist_ok=True)
        (started.base / "models" / "loras" / "small.safetensors").symlink_to(adapter_files["loras"])
        require_learned(Client(started.url))


def requires() -> SpecifierSet:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return SpecifierSet(settings["tool"]["comfy"]["requires-comfyui"])


def test_the_oldest_release_that_is_tested_is_the_oldest_that_is_allowed() -> None:
    assert [str(bound) for bound in requires()] == [f">={next(iter(RELEASES))}"]
    assert all(release in requires() for release in RELEASES)


def test_our_own_log_lines_are_told_from_the_servers() -> None:
    base = "/tmp/koala-comfyui-1a"
    log = f"Setting base directory to: {base}\n   0.0 seconds: {base}/custom_nodes/koala-sdxl"
    assert about_us(log) == []
    assert about_us(f"{log}\nKOALA Accelerate: 12 of 25 passes ran the full U-Net, 25 with guidance") == []
    assert about_us(f"{log} (IMPORT FAILED)") != []
    assert about_us(f"{log}\n[WARNING] koala-sdxl: something") == ["[WARNING] koala-sdxl: something"]
