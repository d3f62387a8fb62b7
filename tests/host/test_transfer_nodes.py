"""KOALA in a graph of stock SDXL nodes, and SDXL's LoRAs on it, in the real server."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

from koala_sdxl.koala.architecture.layout import KOALA_TINY, SDXL, SSD_1B
from koala_sdxl.koala.architecture.lineage import at_widths_of
from tests.host.test_example_workflows import SIDE, SWAP, place_files, random_file, read, require_run, shortened
from tools.generate.workflows import models, shipped
from tools.harness.client import Client, GraphError, Prompt
from tools.harness.server import Server, running
from tools.harness.testhost import Host
from tools.harness.workflow import to_prompt
from tools.synthetic import adapters, random_weights

LORA = shipped("KOALA-700M with an SDXL LoRA")
IN_FP8 = ("--fp8_e4m3fn-unet", "--fp8_e4m3fn-text-enc")
"""As ComfyUI keeps it on a CPU, SDXL's U-Net alone is 10 GB."""
NARROW = {
    "checkpoints": lambda: random_weights.sdxl_checkpoint(random_weights.narrow(SDXL)),
    "diffusion_models": lambda: random_weights.narrow_unet("koala-700m"),
    "loras": lambda: random_weights.sdxl_lora(random_weights.narrow(SDXL)),
}
"""Folder -> the file in a published one's place, of all its layers; text encoders and VAE have their full widths."""


def narrow_file(model: dict[str, str]) -> Path:
    return NARROW[model["directory"]]() if model["directory"] in NARROW else random_file(model)


def in_folder(name: str, workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with its downloads in a folder of that name below those where they belong."""
    text = json.dumps(workflow)
    for model in models(workflow):
        text = text.replace(json.dumps(model["name"]), json.dumps(f"{name}/{model['name']}"))
    moved: dict[str, Any] = json.loads(text)
    return moved


class Stock(NamedTuple):
    """The shipped SDXL graph with the swap in it, small; its node that loads SDXL; a LoRA of the server."""

    client: Client
    graph: Prompt
    loader: str
    lora: str


@pytest.fixture(params=["narrow", "full size"])
def stock(request: pytest.FixtureRequest, host: Host, server: Server, full_size: None) -> Iterator[Stock]:
    if request.param == "narrow":
        swap, lora = (in_folder("narrow", read(path)) for path in (SWAP, LORA))
        yield prepared(swap, lora, server, host, narrow_file)
    else:
        with running(host, arguments=IN_FP8) as roomy:
            yield prepared(read(SWAP), read(LORA), roomy, host, random_file)


def prepared(
    swap: dict[str, Any], lora: dict[str, Any], server: Server, host: Host, file: Callable[[dict[str, str]], Path]
) -> Stock:
    client = Client(server.url)
    place_files(lora, server, host, file)
    require_run(swap, server, client, host, file)
    info = client.object_info()
    (name,) = [model["name"] for model in models(lora) if model["directory"] == "loras"]
    graph = to_prompt(shortened(swap, info), info)
    return Stock(client, graph, number(graph, "CheckpointLoaderSimple"), name)


def number(prompt: Prompt, class_type: str) -> str:
    return next(key for key, node in prompt.items() if node["class_type"] == class_type)


def rewired(prompt: Prompt, to_swap: list[Any], to_sampler: list[Any], **further: Any) -> Prompt:
    """The graph with other wires into the swap's and the sampler's model, and nodes added."""
    changed: Prompt = json.loads(json.dumps(prompt)) | further
    changed[number(prompt, "KoalaUNetSwap")]["inputs"]["model"] = to_swap
    changed[number(prompt, "KSampler")]["inputs"]["model"] = to_sampler
    return changed


def picture(client: Client, prompt: Prompt) -> Image.Image:
    (image,) = client.run(prompt).images()
    return Image.open(io.BytesIO(client.view(image))).convert("RGB")


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


@pytest.mark.nightly
@pytest.mark.slow
def test_a_stock_graph_runs_with_and_without_the_swap_and_loras_go_along(stock: Stock) -> None:
    """By day on a small SDXL: tests/browser/test_templates.py."""
    require_stock_graph(stock)


def require_stock_graph(stock: Stock) -> None:
    """It draws with and without the swap, and a LoRA before the swap draws what it draws behind it."""
    client, graph, loader = stock.client, stock.graph, stock.loader
    swap = number(graph, "KoalaUNetSwap")
    sdxl = rewired(graph, [loader, 0], [loader, 0])
    del sdxl[swap]
    assert not any(node["class_type"].startswith("Koala") for node in sdxl.values())
    sdxls = picture(client, sdxl)
    lora = {"lora_name": stock.lora, "strength_model": 0.8, "strength_clip": 1.0}
    before = {"class_type": "LoraLoader", "inputs": {"model": [loader, 0], "clip": [loader, 1], **lora}}
    koalas = picture(client, graph)
    upstream = picture(client, rewired(graph, ["90", 0], [swap, 0], **{"90": before}))
    inputs = {"model": [swap, 0], "clip": [loader, 1], **lora, "trained_on": "auto", "fold_removed": 0.0}
    after = {"class_type": "KoalaLoraLoader", "inputs": inputs}
    downstream = picture(client, rewired(graph, [loader, 0], ["91", 0], **{"91": after}))
    assert {image.size for image in (sdxls, koalas, upstream, downstream)} == {(SIDE, SIDE)}
    assert same(upstream, downstream)
    assert not same(sdxls, koalas)
    assert not same(koalas, upstream)


def lora_graph(file: str) -> Prompt:
    return {
        "1": {
            "class_type": "KoalaCheckpointLoader",
            "inputs": {"source": "built-in koala-tiny", "weight_dtype": "default"},
        },
        "2": {
            "class_type": "KoalaLoraLoader",
            "inputs": {
                "model": ["1", 0],
                "clip": ["1", 1],
                "lora_name": file,
                "strength_model": 1.0,
                "strength_clip": 1.0,
                "trained_on": "auto",
                "fold_removed": 0.0,
            },
        },
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}},
    }


def place_lora(server: Server, file: str, state: dict[str, torch.Tensor]) -> Path:
    path = server.base / "models" / "loras" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def test_the_loras_coverage_is_shown_on_the_node(server: Server, client: Client) -> None:
    place_lora(server, "small.safetensors", adapters.lora(adapters.SMALL_SDXL, only=adapters.in_attention))
    shown = client.run(lora_graph("small.safetensors")).outputs["2"]["text"]
    assert "U-Net on koala-tiny: 222 applied, 500 removed with KOALA's missing layers" in shown[0]


def flux() -> dict[str, torch.Tensor]:
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    return {f"{module}.lora_up.weight": torch.ones(12, 4), f"{module}.lora_down.weight": torch.ones(4, 8)}


def stable_diffusion_15() -> dict[str, torch.Tensor]:
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{module}.lora_up.weight": torch.ones(640, 4), f"{module}.lora_down.weight": torch.ones(4, 768)}


def ssd_1b() -> dict[str, torch.Tensor]:
    return adapters.lora(at_widths_of(KOALA_TINY, SSD_1B), only=adapters.in_attention)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (stable_diffusion_15, "odd.safetensors is a LoRA for Stable Diffusion 1.x (text width 768, not 96)"),
        (flux, "odd.safetensors is a LoRA for Flux"),
        (ssd_1b, "odd.safetensors is a LoRA for SSD-1B (it has exactly its transformer blocks)"),
        (lambda: {"decoder.conv_in.weight": torch.ones(4, 4, 3, 3)}, "odd.safetensors is a VAE; expected a LoRA"),
        (None, "odd.safetensors is cut short"),
    ],
    ids=["SD 1.5", "Flux", "SSD-1B", "VAE", "corrupt"],
)
def test_a_person_reads_what_a_wrong_lora_is(make: Any, words: str, server: Server, client: Client) -> None:
    path = place_lora(server, "odd.safetensors", (make or flux)())
    if make is None:
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(GraphError) as caught:
        client.run(lora_graph("odd.safetensors"))
    assert words in str(caught.value).splitlines()[0]
