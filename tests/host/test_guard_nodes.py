"""In the real server, stock samplers refuse an SDXL ControlNet or LoRA on KOALA, and draw the adapted one as KOALA
Sampler does."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

from tests.host.test_nodes import custom, graph
from tools.harness.client import Client, GraphError, Prompt
from tools.harness.server import Server
from tools.synthetic import adapters

FILE = "guard-small.safetensors"
OF, STEPS, DENOISE = 25, 15, 0.6
"""The last 15 of 25 steps: there the noise levels and the scale of the first noise are the same at all samplers."""
CONTROLNET = "the conditioning has a ControlNet with SDXL's residuals; koala-tiny has other layers."
LORA = "this MODEL has a LoRA with 48 modules of another shape than koala-tiny's"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module", autouse=True)
def add_on_files(server: Server) -> None:
    """A small SDXL ControlNet and LoRA in the server's folders."""
    files = {"controlnet": adapters.controlnet(), "loras": adapters.lora(adapters.SMALL_SDXL)}
    for folder, state in files.items():
        path = server.base / "models" / folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path)


def with_controlnet(ours: bool) -> Prompt:
    prompt = graph(denoise=DENOISE, **custom(OF))
    prompt["10"] = node("ControlNetLoader", control_net_name=FILE)
    prompt["11"] = node("KoalaControlNet", control_net=["10", 0])
    prompt["12"] = node("EmptyImage", width=128, height=128, batch_size=1, color=0xFF0000)
    prompt["13"] = node(
        "ControlNetApplyAdvanced",
        positive=["2", 0],
        negative=["2", 1],
        control_net=["11" if ours else "10", 0],
        image=["12", 0],
        strength=0.5,
        start_percent=0.0,
        end_percent=1.0,
    )
    prompt["4"]["inputs"] |= {"positive": ["13", 0], "negative": ["13", 1]}
    return prompt


def with_lora(ours: bool) -> Prompt:
    prompt = graph(denoise=DENOISE, **custom(OF))
    inputs = {"model": ["1", 0], "clip": ["1", 1], "lora_name": FILE, "strength_model": 0.3, "strength_clip": 0.0}
    own = node("KoalaLoraLoader", **inputs, trained_on="auto", fold_removed=0.0)
    prompt["10"] = own if ours else node("LoraLoader", **inputs)
    prompt["4"]["inputs"]["model"] = ["10", 0]
    return prompt


def by(sampler: str, prompt: Prompt) -> Prompt:
    """The graph with another sampler in KOALA Sampler's place."""
    inputs = prompt["4"]["inputs"]
    wires = {key: inputs[key] for key in ("model", "positive", "negative", "latent_image")}
    model, seed, cfg = wires["model"], inputs["seed"], inputs["preset.cfg"]
    euler = {"sampler_name": "euler", "scheduler": "ddim_uniform", "cfg": cfg}
    changed = dict(prompt)
    changed["20"] = node("KoalaScheduler", model=model, steps=OF, spacing="leading", denoise=DENOISE)
    changed["21"] = node("KSamplerSelect", sampler_name="euler")
    parts = {"sampler": ["21", 0], "sigmas": ["20", 0]}
    if sampler == "KSampler":
        changed["4"] = node(sampler, **wires, **euler, seed=seed, steps=STEPS, denoise=DENOISE)
    elif sampler == "KSamplerAdvanced":
        range_ = {"start_at_step": OF - STEPS, "end_at_step": OF, "return_with_leftover_noise": "disable"}
        changed["4"] = node(sampler, **wires, **euler, noise_seed=seed, add_noise="enable", steps=OF, **range_)
    elif sampler == "SamplerCustom":
        changed["4"] = node(sampler, **wires, **parts, noise_seed=seed, add_noise=True, cfg=cfg)
    elif sampler == "SamplerCustomAdvanced":
        latent = wires.pop("latent_image")
        changed["22"] = node("CFGGuider", **wires, cfg=cfg)
        changed["23"] = node("RandomNoise", noise_seed=seed)
        changed["4"] = node(sampler, noise=["23", 0], guider=["22", 0], latent_image=latent, **parts)
    return changed


SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
ADD_ONS = pytest.mark.parametrize(("made", "begins"), [(with_controlnet, CONTROLNET), (with_lora, LORA)])


def refusal(client: Client, prompt: Prompt) -> str:
    with pytest.raises(GraphError) as raised:
        client.run(prompt)
    return str(raised.value).splitlines()[0]


def picture(client: Client, prompt: Prompt) -> Image.Image:
    (image,) = client.run(prompt).images("6")
    return Image.open(io.BytesIO(client.view(image))).convert("RGB")


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, in 8-bit levels."""
    return int(torch.frombuffer(bytearray(ImageChops.difference(one, other).tobytes()), dtype=torch.uint8).max())


@ADD_ONS
def test_stock_samplers_refuse_what_koala_sampler_refuses(client: Client, made: Any, begins: str) -> None:
    wanted = refusal(client, made(False))
    assert begins in wanted
    end = wanted[wanted.index(begins) :]
    for sampler in SAMPLERS:
        found = refusal(client, by(sampler, made(False)))
        assert found[found.index(begins) :] == end


@pytest.mark.parametrize(
    ("made", "begins"), [(with_controlnet, CONTROLNET), pytest.param(with_lora, LORA, marks=pytest.mark.nightly)]
)
def test_stock_samplers_draw_the_adapted_one_as_koala_sampler_does(client: Client, made: Any, begins: str) -> None:
    wanted = picture(client, made(True))
    assert apart(wanted, picture(client, graph(denoise=DENOISE, **custom(OF)))) > 50
    for sampler in SAMPLERS:
        assert apart(picture(client, by(sampler, made(True))), wanted) <= 1
