"""The real server on a GPU, with dynamic VRAM: every preset, and LoRAs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image
from torchvision.transforms.functional import to_tensor

from koala_sdxl.host.accelerate.plan import PRESETS
from tests.host.test_nodes import Events, graph
from tests.host.test_speed_node import accelerated
from tools.harness.client import Client, Prompt
from tools.measure.bench.image_quality import psnr


def drawn(client: Client, prompt: Prompt, told: list[str] | None = None) -> Any:
    """The image of a graph, [1, height, width, channels] in 0..1; what the sampler's node was told is added."""
    events = Events()
    (image,) = client.run(prompt, on_event=events).images("6")
    if told is not None:
        told += [data["text"] for data in events.of("progress_text")]
    return to_tensor(Image.open(io.BytesIO(client.view(image)))).permute(1, 2, 0)[None]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_captures_under_dynamic_vram(preset: str, client: Client) -> None:
    told: list[str] = []
    found = drawn(client, accelerated({"preset": preset}, vae=False, seed=301), told)
    assert "by CUDA graph" in told[-1]
    bound = {"exact": 45, "balanced": 35, "fast": 28}[preset]
    assert psnr(found, drawn(client, graph(seed=301))) >= bound


def test_a_lora_and_its_strength(client: Client) -> None:
    for strength in (0.4, 1.0):
        images = []
        for prompt in (accelerated({"preset": "exact"}, vae=False, seed=302), graph(seed=302)):
            inputs = {"lora_name": "built-in koala-tiny-cyan", "strength_model": strength, "strength_clip": 1.0}
            inputs |= {"trained_on": "auto", "fold_removed": 0.0, "model": ["1", 0], "clip": ["1", 1]}
            prompt["20"] = {"class_type": "KoalaLoraLoader", "inputs": inputs}
            first = "10" if "10" in prompt else "4"
            prompt[first]["inputs"]["model"] = ["20", 0]
            images.append(drawn(client, prompt))
        assert psnr(*images) >= 45
