"""The graphs that the real server runs: text to image with stock nodes and with the pack's, 25 steps, cfg 7.5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from koala_sdxl.host.accelerate.plan import PRESETS

Graph = dict[str, dict[str, Any]]
POSITIVE, NEGATIVE = "a golden retriever in a velvet coat, oil painting", "blurry, low quality"
FILES = {"unet_name": "{}.fp16.safetensors", "clip_name1": "clip-l.safetensors", "clip_name2": "clip-g.safetensors"}
VAE_FILE = "vae.safetensors"
BUILT_IN = "koala-tiny"


@dataclass(frozen=True)
class Image:
    """What is drawn: the model (a folder of ``tools.synthetic.random_weights``, or ``BUILT_IN``), side in pixels,
    images in a batch, steps, and the type of the U-Net's weights."""

    model: str = "koala-700m"
    px: int = 1024
    batch: int = 1
    steps: int = 25
    weights: str = "default"

    def __str__(self) -> str:
        return f"{self.px} px" + (f", batch {self.batch}" if self.batch > 1 else "")


def graph(way: str, image: Image, seed: int) -> Graph:
    """The graph of a way of ``WAYS``; ``seed``: another one makes the server compute it again."""
    return WAYS[way](image, seed)


def _stock(image: Image, seed: int) -> Graph:
    files = {name: file.format(image.model) for name, file in FILES.items()}
    unet = {"unet_name": files.pop("unet_name"), "weight_dtype": image.weights}
    return {
        "model": _node("UNETLoader", **unet),
        "clip": _node("DualCLIPLoader", **files, type="sdxl"),
        "vae": _node("VAELoader", vae_name=VAE_FILE),
        "positive": _node("CLIPTextEncode", clip=["clip", 0], text=POSITIVE),
        "negative": _node("CLIPTextEncode", clip=["clip", 0], text=NEGATIVE),
        "sampled": _node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=image.steps,
            cfg=7.5,
            sampler_name="euler",
            scheduler="ddim_uniform",
            denoise=1.0,
        ),
        **_rest(image, ["vae", 0]),
    }


def _stock_compiled(image: Image, seed: int) -> Graph:
    made = _stock(image, seed)
    made["compiled"] = _node("TorchCompileModel", model=["model", 0], backend="inductor")
    made["sampled"]["inputs"]["model"] = ["compiled", 0]
    return made


def _pack(image: Image, seed: int, preset: str = "") -> Graph:
    source = {"source": "built-in koala-tiny"}
    if image.model != BUILT_IN:
        files = {f"source.{name}": file.format(image.model) for name, file in {**FILES, "vae_name": VAE_FILE}.items()}
        source = {"source": "U-Net + text encoders + VAE", **files}
    model, vae = ["loaded", 0], ["loaded", 2]
    made = {"loaded": _node("KoalaCheckpointLoader", **source, weight_dtype=image.weights)}
    if preset:
        made["accelerated"] = _node("KoalaAccelerate", preset=preset, model=model, vae=vae)
        model, vae = ["accelerated", 0], ["accelerated", 1]
    custom = {"preset.steps": image.steps, "preset.cfg": 7.5, "preset.spacing": "leading"}
    return {
        **made,
        "prompt": _node(
            "KoalaPrompt",
            positive=POSITIVE,
            negative=NEGATIVE,
            style="no style",
            mode="reference",
            clip=["loaded", 1],
        ),
        "sampled": _node(
            "KoalaSampler",
            model=model,
            positive=["prompt", 0],
            negative=["prompt", 1],
            latent_image=["empty", 0],
            seed=seed,
            preset="custom",
            sampler_name="euler",
            denoise=1.0,
            **custom,
        ),
        **_rest(image, vae),
    }


def _rest(image: Image, vae: list[Any]) -> Graph:
    return {
        "empty": _node("EmptyLatentImage", width=image.px, height=image.px, batch_size=image.batch),
        "decoded": _node("VAEDecode", samples=["sampled", 0], vae=vae),
        "saved": _node("SaveImage", images=["decoded", 0], filename_prefix="bench"),
    }


def idle() -> Graph:
    """A graph without a model."""
    return {
        "empty": _node("EmptyImage", width=16, height=16, batch_size=1, color=0),
        "shown": _node("PreviewImage", images=["empty", 0]),
    }


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


STOCK, COMPILED, PACK = "stock", "stock, compiled", "pack"
WAYS: Mapping[str, Any] = {
    STOCK: _stock,
    COMPILED: _stock_compiled,
    PACK: _pack,
    **{f"pack, {preset}": lambda image, seed, preset=preset: _pack(image, seed, preset) for preset in PRESETS},
}
"""Ways to the same image, each a function of what is drawn and the seed."""
