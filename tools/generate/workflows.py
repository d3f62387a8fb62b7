"""The graphs of example_workflows/; `python3 dev.py generate workflows` writes the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koala_sdxl.koala.releases import RELEASES, Release
from tools.generate import tiny_graphs
from tools.generate.canvas import Columns, Node, canvas
from tools.generate.generator import of_texts
from tools.generate.notes import model_links, note
from tools.generate.parts import (
    NEGATIVE,
    PROMPT,
    decoded,
    empty_latent,
    named_file,
    prompt,
    published_loader,
    sampler,
    text_to_image,
)
from tools.harness.testhost import ROOT

FOLDER = ROOT / "example_workflows"

HUB = "https://huggingface.co"
SDXL_BASE = named_file(
    f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors", "checkpoints"
)
LORA = named_file(f"{HUB}/nerijs/pixel-art-xl/resolve/main/pixel-art-xl.safetensors", "loras")
CONTROLNET = named_file(
    f"{HUB}/xinsir/controlnet-canny-sdxl-1.0/resolve/main/diffusion_pytorch_model.safetensors",
    "controlnet",
    "controlnet-canny-sdxl-1.0.safetensors",
)


def published_text_to_image(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    about = note(
        release.name,
        f"The sampler's preset *auto* follows the model: {settings}. KOALA Model Info shows what was detected.",
    )
    text = prompt(loader, PROMPT, NEGATIVE)
    return text_to_image(loader, text, settings.size, release.name, [about, model_links(loader)])


def sampler_custom(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    about = note(
        f"{release.name} with SamplerCustom",
        "KOALA Scheduler gives the published noise levels to core's own sampler nodes; set the guidance (cfg) there. "
        f"Published: {settings}.",
    )
    text = prompt(loader, PROMPT, NEGATIVE)
    latent = empty_latent(settings.size)
    sigmas = Node("KoalaScheduler", {"model": loader["MODEL"], "steps": settings.steps})
    euler = Node("KSamplerSelect")
    links = {"positive": text["positive"], "negative": text["negative"], "latent_image": latent["LATENT"]}
    links |= {"sampler": euler["SAMPLER"], "sigmas": sigmas["SIGMAS"]}
    sampling = Node("SamplerCustom", {"model": loader["MODEL"], **links, "cfg": settings.cfg})
    decode, save = decoded(loader, sampling["output"], release.name)
    return [[about, model_links(loader)], [loader, sigmas, euler], [text, latent], [sampling, decode], [save]]


def accelerated(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    fast = Node("KoalaAccelerate", {"model": loader["MODEL"], "vae": loader["VAE"], "preset": "balanced"})
    about = note(
        f"{release.name}, sampled faster",
        "**KOALA Accelerate**, last on the MODEL wire: most steps run only a small part of the U-Net and reuse cached "
        "features, extrapolated from earlier steps. After a run, the sampler shows how many were full steps.",
        "*exact*: identical image, on a GPU but for rounding. *balanced*: nearly identical. *fast*: details and "
        "occasionally shapes differ. "
        f"Bypass the node (Ctrl+B) to compare. The sampler's preset *auto* follows the model: {settings}.",
    )
    text = prompt(loader, PROMPT, NEGATIVE)
    latent = empty_latent(settings.size)
    sampling = sampler(fast["MODEL"], text, latent["LATENT"])
    decode, save = decoded(fast, sampling["LATENT"], "koala-accelerated")
    return [[about, model_links(loader)], [loader, fast], [text, latent], [sampling, decode], [save]]


def swap_in_an_sdxl_graph(release: Release) -> Columns:
    settings, unet = release.variant.settings, published_loader(release).models[:1]
    loader = Node("CheckpointLoaderSimple", {"ckpt_name": SDXL_BASE[0]["name"]}, SDXL_BASE)
    swap = Node("KoalaUNetSwap", {"model": loader["MODEL"], "unet_name": unet[0]["name"]}, unet)
    about = note(
        "KOALA in an SDXL graph",
        "An SDXL graph of stock nodes with one node added: **KOALA U-Net Swap** on the MODEL wire. LoRAs, patches and "
        "sampling changes before it are carried over; CLIP, VAE and everything else stay as they are.",
        f"The sampler has the settings that {release.name} was published with: {settings}, which stock ComfyUI calls "
        "euler, ddim_uniform. Bypass the swap (Ctrl+B) to run SDXL itself.",
    )
    texts = [Node("CLIPTextEncode", {"clip": loader["CLIP"], "text": text}) for text in (PROMPT, NEGATIVE)]
    latent = empty_latent(settings.size)
    links = {"positive": texts[0]["CONDITIONING"], "negative": texts[1]["CONDITIONING"]}
    widgets = {"steps": settings.steps, "cfg": settings.cfg, "scheduler": "ddim_uniform"}
    sampling = Node("KSampler", {"model": swap["MODEL"], **links, "latent_image": latent["LATENT"], **widgets})
    decode, save = decoded(loader, sampling["LATENT"], "koala-swap")
    return [[about, model_links(loader, swap)], [loader, swap], [*texts, latent], [sampling, decode], [save]]


def sdxl_lora(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    inputs = {"model": loader["MODEL"], "clip": loader["CLIP"], "lora_name": LORA[0]["name"]}
    lora = Node("KoalaLoraLoader", inputs, LORA)
    about = note(
        f"An SDXL LoRA on {release.name}",
        "**KOALA LoRA Loader** applies each of the LoRA's changes to the KOALA layer that came from the one it was "
        "trained on, and shows how many were applied. KOALA has fewer layers, so a strength above 1 may be needed.",
    )
    text = Node("KoalaPrompt", {"clip": lora["CLIP"], "positive": f"pixel art, {PROMPT}", "negative": NEGATIVE})
    latent = empty_latent(settings.size)
    links = {"positive": text["positive"], "negative": text["negative"], "latent_image": latent["LATENT"]}
    sampling = Node("KoalaSampler", {"model": lora["MODEL"], **links})
    decode, save = decoded(loader, sampling["LATENT"], "koala-lora")
    return [[about, model_links(loader, lora)], [loader, lora], [text, latent], [sampling, decode], [save]]


def sdxl_controlnet(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    control = Node("ControlNetLoader", {"control_net_name": CONTROLNET[0]["name"]}, CONTROLNET)
    fitted = Node("KoalaControlNet", {"control_net": control["CONTROL_NET"]})
    about = note(
        f"An SDXL ControlNet on {release.name}",
        "**KOALA ControlNet**, between the ControlNet's loader and Apply ControlNet, moves its residuals to KOALA's "
        "skip connections. Union ControlNets and T2I-Adapters for SDXL go through it as well.",
        "Load an image of your own; its edges guide what is drawn.",
    )
    image = Node("LoadImage")
    edges = Node("Canny", {"image": image["IMAGE"]})
    text = prompt(loader, PROMPT, NEGATIVE)
    links = {"positive": text["positive"], "negative": text["negative"], "image": edges["IMAGE"]}
    applied = Node("ControlNetApplyAdvanced", {**links, "control_net": fitted["CONTROL_NET"], "strength": 0.8})
    latent = empty_latent(settings.size)
    sampling = sampler(loader["MODEL"], applied, latent["LATENT"])
    decode, save = decoded(loader, sampling["LATENT"], "koala-controlnet")
    return [
        [about, model_links(loader, control)],
        [loader, control, image],
        [text, fitted, edges],
        [applied, latent],
        [sampling, decode],
        [save],
    ]


def graphs() -> dict[str, Columns]:
    """Every shipped graph by its name, in the order of their numbers: first what runs at once, then what most people
    come for."""
    released = {release.name: release for release in RELEASES}
    base, lightning = released["koala-700m"], released["koala-lightning-700m"]
    return {
        "KOALA-tiny text to image": tiny_graphs.tiny_text_to_image(),
        f"KOALA-Lightning text to image ({lightning.variant.settings.steps} steps)": published_text_to_image(lightning),
        f"KOALA-700M text to image ({base.variant.settings.steps} steps)": published_text_to_image(base),
        "KOALA-700M in an SDXL graph": swap_in_an_sdxl_graph(base),
        "KOALA-700M with an SDXL LoRA": sdxl_lora(base),
        "KOALA-700M with an SDXL ControlNet": sdxl_controlnet(base),
        "KOALA-700M accelerated": accelerated(base),
        "KOALA-700M with SamplerCustom": sampler_custom(base),
        "KOALA-tiny image to image": tiny_graphs.tiny_image_to_image(),
        "KOALA-tiny with a LoRA": tiny_graphs.tiny_lora(),
        "KOALA-tiny with a ControlNet": tiny_graphs.tiny_controlnet(),
        "KOALA-tiny LoRA training": tiny_graphs.tiny_training(),
    }


def workflows() -> dict[str, dict[str, Any]]:
    """Every shipped workflow by its title, which is its file's stem and what the canvas lists it as.

    A number comes before the graph's name. The host lists a folder as its file system does, and the canvas keeps that
    order: by name on NTFS, in none on ext4, where the dialog can be told to sort alphabetically.
    """
    numbered = enumerate(graphs().items(), 1)
    return {f"{number:02} {name}": canvas(name, columns) for number, (name, columns) in numbered}


def name_of(title: str) -> str:
    """A graph's name from its workflow's title."""
    return title.partition(" ")[2]


def shipped(name: str) -> Path:
    """The file of a graph, by its name."""
    (path,) = (path for path in FOLDER.glob("*.json") if name_of(path.stem) == name)
    return path


def models(workflow: Mapping[str, Any]) -> list[dict[str, str]]:
    """The downloads that a workflow offers: each file's name, address, and folder below models/."""
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]


def as_text(workflow: Mapping[str, Any]) -> str:
    """A workflow as its file holds it."""
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def files() -> dict[Path, str]:
    """The text of each file."""
    return {FOLDER / f"{title}.json": as_text(workflow) for title, workflow in workflows().items()}


GENERATOR = of_texts(FOLDER, "*.json", files)
