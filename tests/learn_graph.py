"""KOALA LoRA from SDXL in the real server: a LoRA is made, applied, saved, and loaded from its file.

The server has the nodes of tests/browser/pack, and the LoRA ``small.safetensors``.
"""

from __future__ import annotations

import io
import re
from typing import Any

from PIL import Image

from tools.harness.client import Client, Prompt

PRESET = {"preset": "custom", "preset.steps": 4, "preset.cfg": 3.0, "preset.spacing": "leading"}
PROMPTS = "\n".join(f"a star on a {colour} background" for colour in ("red", "green", "blue", "yellow", "white"))
SAVED = "loras/learned"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def learned() -> Prompt:
    """The LoRA is made of a stock LoRA on SDXL, applied by core's node, and saved by core's node."""
    models = {"sdxl": ["1", 0], "sdxl_changed": ["2", 0], "koala": ["3", 0], "clip": ["1", 1], "clip_changed": ["2", 1]}
    few = {"rank": 4, "samples": 10, "size": 64, "seed": 3}
    stock = {"lora_name": "small.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    return {
        "1": node("TinySDXL"),
        "2": node("LoraLoader", model=["1", 0], clip=["1", 1], **stock),
        "3": node("KoalaCheckpointLoader", source="built-in koala-tiny", weight_dtype="default"),
        "4": node("KoalaLoraFromSdxl", prompts=PROMPTS, **models, **few, **PRESET),
        "5": node("LoraModelLoader", model=["3", 0], lora=["4", 0], strength_model=1.0, bypass=False),
        "6": node("SaveLoRA", lora=["4", 0], prefix=SAVED),
        **drawn(["5", 0]),
    }


def from_file() -> Prompt:
    """The saved LoRA by KOALA LoRA Loader."""
    chosen = {"lora_name": f"{SAVED.removeprefix('loras/')}_00001_.safetensors", "trained_on": "auto"}
    strengths = {"strength_model": 1.0, "strength_clip": 1.0, "fold_removed": 0.0}
    return {
        "1": node("TinySDXL"),
        "3": node("KoalaCheckpointLoader", source="built-in koala-tiny", weight_dtype="default"),
        "5": node("KoalaLoraLoader", model=["3", 0], clip=["3", 1], **chosen, **strengths),
        **drawn(["5", 0]),
    }


def without() -> Prompt:
    """KOALA as it is."""
    return {"3": node("KoalaCheckpointLoader", source="built-in koala-tiny", weight_dtype="default"), **drawn(["3", 0])}


def drawn(model: list[Any]) -> Prompt:
    words = {"positive": "a red star", "negative": "", "style": "no style", "mode": "reference"}
    wires = {"model": model, "positive": ["7", 0], "negative": ["7", 1], "latent_image": ["8", 0]}
    return {
        "7": node("KoalaPrompt", clip=["3", 1], **words),
        "8": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "9": node("KoalaSampler", **wires, seed=5, sampler_name="euler", denoise=1.0, **PRESET),
        "10": node("VAEDecode", samples=["9", 0], vae=["3", 2]),
        "11": node("PreviewImage", images=["10", 0]),
    }


def require_learned(client: Client) -> None:
    """The report says what was reached, and the picture by the LoRA is another one, which its file gives, too."""
    made = client.run(learned())
    assert re.match(r"reached on 2 held-out samples: -?\d+ % of the wanted change, -?\d+ % by lineage", made.text("4"))
    pictures = [Image.open(io.BytesIO(client.view(image))).convert("RGB") for image in made.images()]
    for prompt in (from_file(), without()):
        (image,) = client.run(prompt).images()
        pictures.append(Image.open(io.BytesIO(client.view(image))).convert("RGB"))
    with_lora, by_file, plain = (picture.tobytes() for picture in pictures)
    assert with_lora == by_file != plain
