"""Our nodes in the real server: what a person sees of them over HTTP and WebSocket."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from koala_sdxl.koala.architecture.layout import SDXL
from tests.unit import files
from tools.harness.client import Client, GraphError, Interrupted, Prompt
from tools.harness.server import Server
from tools.measure import reference
from tools.tiny import SHIPPED
from tools.tiny.judge import judge
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES

PROMPT = "a red circle on a blue background"


def graph(source: dict[str, Any] | None = None, **sampler: Any) -> Prompt:
    """Text to image with koala-tiny; ``sampler`` changes inputs of the sampler node."""
    return {
        "1": {"class_type": "KoalaCheckpointLoader", "inputs": {"weight_dtype": "default", **(source or built_in())}},
        "2": {
            "class_type": "KoalaPrompt",
            "inputs": {
                "clip": ["1", 1],
                "positive": PROMPT,
                "negative": "",
                "style": "no style",
                "mode": "reference",
            },
        },
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "4": {
            "class_type": "KoalaSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["2", 1],
                "latent_image": ["3", 0],
                "seed": 5,
                "sampler_name": "euler",
                "denoise": 1.0,
                "preset": "auto",
                **sampler,
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "test"}},
    }


def built_in() -> dict[str, str]:
    return {"source": "built-in koala-tiny"}


def custom(steps: int, seed: int = 5) -> dict[str, Any]:
    return {
        "preset": "custom",
        "preset.steps": steps,
        "preset.cfg": 7.5,
        "preset.spacing": "leading",
        "seed": seed,
    }


class Events:
    """Collects what happens while a graph runs."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        self.seen.append((kind, data))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.seen if name == kind]


def picture(client: Client, prompt: Prompt) -> Image.Image:
    return Image.open(io.BytesIO(client.view(client.run(prompt).images("6")[0])))


def seen(picture: Image.Image) -> tuple[str, str, str]:
    """Shape's colour, shape and background's colour, judged by the pixels."""
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    found = judge(pixels.view(1, picture.height, picture.width, 3).movedim(-1, 1) / 127.5 - 1)
    return COLOUR_NAMES[int(found.colour)], SHAPE_NAMES[int(found.shape)], COLOUR_NAMES[int(found.background)]


def test_the_prompt_is_answered(client: Client) -> None:
    assert seen(picture(client, graph())) == ("red", "circle", "blue")


def test_the_saved_picture_is_the_reference_pipelines_to_one_level(client: Client) -> None:
    """SaveImage cuts 8-bit values off where diffusers rounds them: one level apart at most, anywhere."""
    pipeline = reference.pipeline(SHIPPED)
    generator = torch.Generator().manual_seed(5)
    settings = {"num_inference_steps": 25, "guidance_scale": 7.5, "height": 128, "width": 128}
    wanted = pipeline(PROMPT, generator=generator, **settings).images[0]
    apart = torch.frombuffer(
        bytearray(ImageChops.difference(picture(client, graph()), wanted).tobytes()), dtype=torch.uint8
    )
    assert int(apart.max()) <= 1


def test_progress_and_previews_of_every_step_arrive(client: Client) -> None:
    events = Events()
    client.run(graph(**custom(7, seed=81)), on_event=events)
    sampled = [data["value"] for data in events.of("progress") if data["node"] == "4"]
    assert sampled[-1] == 7
    assert events.of("preview")


def test_the_sampler_says_what_auto_chose(client: Client) -> None:
    text = client.run(graph(seed=82)).text("4")
    assert text.startswith("25 steps, cfg 7.5, leading, euler\nThese are the published settings of koala-tiny base. ")


def test_model_info_is_shown_and_can_be_wired_on(client: Client) -> None:
    prompt = {
        "1": {"class_type": "KoalaCheckpointLoader", "inputs": {"weight_dtype": "default", **built_in()}},
        "2": {"class_type": "KoalaModelInfo", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    result = client.run(prompt)
    assert result.text("2") == result.text("3")
    for fact in ("koala-tiny", "7,541,284", "fp16", "base", "25 steps, cfg 7.5, leading"):
        assert fact in result.text("2")


def test_a_cancelled_run_leaves_nothing_behind(client: Client) -> None:
    before = picture(client, graph())

    def cancel(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == "4" and data["value"] == 2:
            client.interrupt()

    with pytest.raises(Interrupted):
        client.run(graph(**custom(1000)), on_event=cancel)
    assert picture(client, graph(seed=5)).tobytes() == before.tobytes()


def test_a_model_is_loaded_once_and_again_when_its_file_changes(client: Client, server: Server) -> None:
    file = server.base / "models" / "checkpoints" / "changing.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(SHIPPED, file)
    source = {"source": "checkpoint", "source.ckpt_name": file.name}

    def cached() -> set[str]:
        events = Events()
        client.run(graph(source), on_event=events)
        return {node for data in events.of("execution_cached") for node in data["nodes"]}

    assert "1" not in cached()
    assert "1" in cached()
    os.utime(file, ns=(1, 1))
    assert "1" not in cached()


def test_every_folder_of_models_is_listed(client: Client, server: Server) -> None:
    folder = server.base / "models" / "diffusers" / "nested" / "some-koala"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    source = client.get("/object_info/KoalaCheckpointLoader")["KoalaCheckpointLoader"]["input"]["required"]["source"]
    options = {option["key"]: option["inputs"]["required"] for option in source[1]["options"] if option["inputs"]}
    assert "nested/some-koala" in options["diffusers folder"]["folder"][1]["options"]
    with pytest.raises(GraphError, match=r"some-koala/unet/diffusion_pytorch_model\.fp16\.safetensors .* is not there"):
        client.run(graph({"source": "diffusers folder", "source.folder": "nested/some-koala"}))


def test_a_wrong_file_is_named_with_the_node_that_loads_it(client: Client, server: Server) -> None:
    shapes = files.unet(SDXL, "comfy", "model.diffusion_model.")
    files.write(server.base / "models" / "checkpoints" / "some-sdxl.safetensors", shapes)
    with pytest.raises(GraphError) as caught:
        client.run(graph({"source": "checkpoint", "source.ckpt_name": "some-sdxl.safetensors"}))
    first = str(caught.value).splitlines()[0]
    assert "some-sdxl.safetensors is an SDXL base model" in first
    assert "expected a KOALA U-Net" in first
    assert "Load it with the stock node" in first


def test_nothing_that_is_not_listed_can_be_asked_for(client: Client) -> None:
    with pytest.raises(GraphError, match="not in list"):
        client.run(graph({"source": "checkpoint", "source.ckpt_name": "../../etc/passwd"}))
    with pytest.raises(GraphError, match="not in list"):
        client.run(graph({"source": "diffusers folder", "source.folder": "../.."}))


def test_stock_nodes_take_our_outputs(client: Client) -> None:
    prompt = graph()
    prompt["4"] = {
        "class_type": "KSampler",
        "inputs": {
            **{name: prompt["4"]["inputs"][name] for name in ("model", "positive", "negative", "latent_image", "seed")},
            "steps": 25,
            "cfg": 7.5,
            "sampler_name": "euler",
            "scheduler": "ddim_uniform",
            "denoise": 1.0,
        },
    }
    assert seen(picture(client, prompt)) == ("red", "circle", "blue")


def test_the_pack_is_imported_without_a_complaint(server: Server) -> None:
    log = server.log.read_text("utf-8", errors="replace").partition("To see the GUI go to")[0].splitlines()
    (line,) = [line for line in log if line.strip().endswith("koala-sdxl") and "seconds" in line]
    assert "IMPORT FAILED" not in line
    assert not [line for line in log if "warning" in line.lower() and "koala" in line.lower()]


def test_every_node_explains_itself(object_info: dict[str, Any]) -> None:
    ours = {name: info for name, info in object_info.items() if name.startswith("Koala")}
    assert len(ours) == 14
    for info in ours.values():
        assert info["display_name"].startswith("KOALA ")
        assert info["category"] in ("KOALA", "KOALA/SDXL add-ons")
        assert info["description"]
        assert info["search_aliases"]
        assert all(info["output_tooltips"])
        inputs = [spec for group in info["input"].values() for spec in group.values() if isinstance(spec, list)]
        assert all(spec[1].get("tooltip") for spec in inputs if isinstance(spec[0], str) and len(spec) > 1)
    assert len({info["display_name"] for info in ours.values()}) == 14
    assert Counter(info["python_module"] for info in ours.values()) == {"custom_nodes.koala-sdxl": 14}
