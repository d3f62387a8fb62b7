"""Graphs as ComfyUI runs them, for the tests of the batch tool: the usual ones, and those saved in this repository."""

from __future__ import annotations

from typing import Any

import pytest

from batch.columns import places
from batch.workflow import Graph, read
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

SAVED = {path.name.removesuffix(".api.json"): path for path in (ROOT / "tests/host/workflows").rglob("*.api.json")}
SEED = 2**64 - 1


def saved(name: str) -> Graph:
    return read(SAVED[name], lambda: {}).graph


def node(class_type: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


def at(graph: Graph, column: str) -> list[str]:
    """The places of a column, as id.input."""
    return [f"{place.node}.{place.input}" for place in places(graph, [column], "t.csv")[column]]


def complaint(graph: Graph, *columns: str) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        places(graph, columns, "t.csv")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("t.csv: column")
    return line


def sdxl() -> Graph:
    """ComfyUI's usual graph."""
    sampler = {"seed": 5, "steps": 25, "cfg": 7.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1}
    return {
        "4": node("CheckpointLoaderSimple", "Load Checkpoint", ckpt_name="sd_xl_base_1.0.safetensors"),
        "5": node("EmptyLatentImage", "Empty Latent Image", width=1024, height=1024, batch_size=1),
        "6": node("CLIPTextEncode", "CLIP Text Encode (Prompt)", text="a koala", clip=["4", 1]),
        "7": node("CLIPTextEncode", "CLIP Text Encode (Prompt)", text="blurry", clip=["4", 1]),
        "3": node(
            "KSampler",
            "KSampler",
            **sampler,
            model=["4", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["5", 0],
        ),
        "8": node("VAEDecode", "VAE Decode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", "Save Image", filename_prefix="ComfyUI", images=["8", 0]),
    }


def sdxl_encoders() -> Graph:
    """Both texts of SDXL, with sizes of their own."""
    graph = sdxl()
    sizes: dict[str, Any] = {
        "width": 1024,
        "height": 1024,
        "crop_w": 0,
        "crop_h": 0,
        "target_width": 1024,
        "target_height": 1024,
    }
    for name in ("6", "7"):
        text = graph[name]["inputs"]["text"]
        graph[name] = node("CLIPTextEncodeSDXL", **sizes, text_g=text, text_l=f"{text}, photo", clip=["4", 1])
    return graph


def guided() -> Graph:
    """SamplerCustomAdvanced: the sampler has no conditioning of its own."""
    graph = sdxl()
    graph["3"] = node(
        "SamplerCustomAdvanced",
        noise=["10", 0],
        guider=["11", 0],
        sampler=["12", 0],
        sigmas=["13", 0],
        latent_image=["5", 0],
    )
    graph["10"] = node("RandomNoise", noise_seed=5)
    graph["11"] = node("CFGGuider", cfg=7.5, model=["4", 0], positive=["6", 0], negative=["7", 0])
    graph["12"] = node("KSamplerSelect", sampler_name="euler")
    graph["13"] = node("BasicScheduler", scheduler="normal", steps=25, denoise=1, model=["4", 0])
    return graph


def refined(same: bool = True) -> Graph:
    """Base and refiner, each with encoders of its own."""
    graph = sdxl()
    graph["12"] = node("CheckpointLoaderSimple", "Load Refiner", ckpt_name="sd_xl_refiner_1.0.safetensors")
    text = {"text": "a koala" if same else "a koala in detail"}
    graph["15"] = node(
        "CLIPTextEncodeSDXLRefiner", "Refiner", ascore=6, width=1024, height=1024, clip=["12", 1], **text
    )
    graph["16"] = node("CLIPTextEncode", "CLIP Text Encode (Prompt)", text="blurry", clip=["12", 1])
    base = {
        "noise_seed": 5,
        "steps": 25,
        "cfg": 8,
        "positive": ["6", 0],
        "negative": ["7", 0],
        "latent_image": ["5", 0],
    }
    graph["3"] = node("KSamplerAdvanced", "Base", add_noise="enable", model=["4", 0], **base)
    refiner = {**base, "noise_seed": 0, "positive": ["15", 0], "negative": ["16", 0], "latent_image": ["3", 0]}
    graph["11"] = node("KSamplerAdvanced", "Refine", add_noise="disable", model=["12", 0], **refiner)
    graph["8"]["inputs"]["samples"] = ["11", 0]
    return graph


def controlled() -> Graph:
    """A ControlNet between encoders and sampler, whose image another sampler made."""
    graph = sdxl()
    other = {"seed": 9, "steps": 4, "model": ["4", 0], "positive": ["20", 0], "negative": ["20", 1]}
    graph["20"] = node("KoalaPrompt", "KOALA Prompt", positive="a star", negative="", clip=["4", 1])
    graph["21"] = node("KSampler", "Sketch", **other, latent_image=["5", 0])
    graph["22"] = node("VAEDecode", samples=["21", 0], vae=["4", 2])
    graph["23"] = node("ControlNetLoader", control_net_name="c.safetensors")
    graph["24"] = node(
        "ControlNetApplyAdvanced",
        strength=1,
        positive=["6", 0],
        negative=["7", 0],
        control_net=["23", 0],
        image=["22", 0],
    )
    graph["3"]["inputs"] |= {"positive": ["24", 0], "negative": ["24", 1]}
    return graph


def image_controlled() -> Graph:
    """The same with an image from a file."""
    graph = controlled()
    graph["22"] = node("LoadImage", image="edges.png")
    return {name: part for name, part in graph.items() if name not in ("20", "21")}


def primitive_text(*outputs: str) -> Graph:
    """Texts that come from other nodes."""
    graph = sdxl()
    graph["30"] = node("PrimitiveStringMultiline", "My prompt", value="a koala")
    for name in outputs:
        graph[name]["inputs"]["text"] = ["30", 0]
    return graph


KOALA = {
    "KOALA-tiny text to image": ("4.positive", "4.negative", "6.seed", "5.width"),
    "KOALA-tiny with a LoRA": ("4.positive", "4.negative", "6.seed", "5.width"),
    "KOALA-700M text to image (25 steps)": ("4.positive", "4.negative", "6.seed", "5.width"),
    "KOALA-700M in an SDXL graph": ("4.text", "5.text", "7.seed", "6.width"),
    "KOALA-700M with SamplerCustom": ("5.positive", "5.negative", "7.noise_seed", "6.width"),
    "every node": ("10.positive", "10.negative", "16.seed", "15.width"),
}
"""The places of prompt, negative, seed and width."""
