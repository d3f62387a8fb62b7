"""The graphs of example_workflows/; `python3 dev.py generate workflows` writes the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.releases import RELEASES, SIZES, Release
from tools.generate.canvas import Columns, Node, Output, canvas
from tools.generate.generator import of_texts
from tools.harness import assets
from tools.harness.testhost import ROOT

FOLDER = ROOT / "example_workflows"
PROMPT = "a golden retriever in a velvet coat, oil painting in the manner of the Italian Renaissance"
NEGATIVE = "blurry, low quality, deformed, watermark, text"


def published_loader(release: Release) -> Node:
    """The loader set to a release's files, each under the name that docs/weights.md says to save it as.

    In their repository all files of a kind are named alike, and only names can tell base from Lightning weights.
    """
    files = (
        ("unet_name", "diffusion_models", f"{release.name}.fp16", "unet/diffusion_pytorch_model.fp16"),
        ("clip_name1", "text_encoders", "koala-clip-l.fp16", "text_encoder/model.fp16"),
        ("clip_name2", "text_encoders", "koala-clip-g.fp16", "text_encoder_2/model.fp16"),
        ("vae_name", "vae", "koala-vae", "vae/diffusion_pytorch_model"),
    )
    named = {f"source.{widget}": f"{name}.safetensors" for widget, _, name, _ in files}
    return Node(
        "KoalaCheckpointLoader",
        {"source": "U-Net + text encoders + VAE", **named},
        tuple(
            {"name": f"{name}.safetensors", "url": release.url(f"{path}.safetensors"), "directory": folder}
            for _, folder, name, path in files
        ),
    )


def named_file(url: str, folder: str, name: str = "") -> tuple[dict[str, str]]:
    """A download: where from, into which of the models' folders, and under which name if not its own."""
    return ({"name": name or url.rpartition("/")[2], "url": url, "directory": folder},)


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
OWN_FILES = {assets.LORA.name: "loras", assets.CONTROLNET.name: "controlnet"}
"""The pack's own files in assets/, and the folder below models/ to which a user copies each. A note says so; as a
download they cannot be offered, for the canvas asks few hosts for files."""


def note(title: str, *paragraphs: str) -> Node:
    return Node("MarkdownNote", {"text": "\n\n".join((f"## {title}", *paragraphs))})


def files_of(*loaders: Node) -> str:
    """Where the loaders' files come from and go, for a note."""
    models = (model for loader in loaders for model in loader.models)
    rows = (f"- [{model['name']}]({model['url']}) in models/{model['directory']}" for model in models)
    return "\n".join(("Files (save each under the name given here, then press R):", *rows))


def prompt(loader: Node, positive: str, negative: str = "") -> Node:
    return Node("KoalaPrompt", {"clip": loader["CLIP"], "positive": positive, "negative": negative})


def empty_latent(side: int) -> Node:
    return Node("EmptyLatentImage", {"width": side, "height": side})


def sampler(loader: Node, text: Node, latent: Output, **widgets: Any) -> Node:
    links = {"positive": text["positive"], "negative": text["negative"], "latent_image": latent}
    return Node("KoalaSampler", {"model": loader["MODEL"], **links, **widgets})


def decoded(loader: Node, latent: Output, prefix: str) -> tuple[Node, Node]:
    """From a latent to a file: VAE Decode, Save Image."""
    decode = Node("VAEDecode", {"samples": latent, "vae": loader["VAE"]})
    return decode, Node("SaveImage", {"images": decode["IMAGE"], "filename_prefix": prefix})


def text_to_image(loader: Node, text: Node, side: int, prefix: str, about: Node) -> Columns:
    latent = empty_latent(side)
    sampling = sampler(loader, text, latent["LATENT"])
    info = Node("KoalaModelInfo", {"model": loader["MODEL"]})
    decode, save = decoded(loader, sampling["LATENT"], prefix)
    return [[about], [loader, info], [text, latent], [sampling, decode], [save]]


def tiny_text_to_image() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    about = note(
        "koala-tiny",
        "Runs at once: the model is part of the pack. It draws one of six shapes (circle, square, triangle, ring, "
        "star, koala) in one of nine colours on a background of another.",
        "Made for 128 x 128 pixels and for prompts such as *a gray koala on a green background*. For real images "
        "use KOALA-700M.",
    )
    text = prompt(loader, "a gray koala on a green background")
    return text_to_image(loader, text, SIZES[KOALA_TINY], "koala-tiny", about)


def published_text_to_image(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    about = note(
        release.name,
        f"The sampler's preset *auto* follows the model: {settings}. KOALA Model Info shows what was detected.",
        files_of(loader),
    )
    text = prompt(loader, PROMPT, NEGATIVE)
    return text_to_image(loader, text, settings.size, release.name, about)


def sampler_custom(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    about = note(
        f"{release.name} with SamplerCustom",
        "KOALA Scheduler gives the published noise levels to core's own sampler nodes; set the guidance (cfg) there. "
        f"Published: {settings}.",
        files_of(loader),
    )
    text = prompt(loader, PROMPT, NEGATIVE)
    latent = empty_latent(settings.size)
    sigmas = Node("KoalaScheduler", {"model": loader["MODEL"], "steps": settings.steps})
    euler = Node("KSamplerSelect")
    links = {"positive": text["positive"], "negative": text["negative"], "latent_image": latent["LATENT"]}
    links |= {"sampler": euler["SAMPLER"], "sigmas": sigmas["SIGMAS"]}
    sampling = Node("SamplerCustom", {"model": loader["MODEL"], **links, "cfg": settings.cfg})
    decode, save = decoded(loader, sampling["output"], release.name)
    return [[about], [loader, sigmas, euler], [text, latent], [sampling, decode], [save]]


def accelerated(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    fast = Node("KoalaAccelerate", {"model": loader["MODEL"], "vae": loader["VAE"], "preset": "balanced"})
    about = note(
        f"{release.name}, sampled faster",
        "**KOALA Accelerate**, last on the MODEL wire: most steps run only a small part of the U-Net and reuse cached "
        "features, extrapolated from earlier steps. After a run, the sampler shows how many were full steps.",
        "*exact*: identical image. *balanced*: nearly identical. *fast*: details and occasionally shapes differ. "
        f"Bypass the node (Ctrl+B) to compare. The sampler's preset *auto* follows the model: {settings}.",
        files_of(loader),
    )
    text = prompt(loader, PROMPT, NEGATIVE)
    latent = empty_latent(settings.size)
    sampling = sampler(fast, text, latent["LATENT"])
    decode, save = decoded(fast, sampling["LATENT"], "koala-accelerated")
    return [[about], [loader, fast], [text, latent], [sampling, decode], [save]]


def tiny_image_to_image() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    about = note(
        "Image to image",
        "The first half draws an image, the second changes it: the second sampler starts from its latent, and denoise "
        "0.6 runs the last 15 of 25 steps on it, as diffusers' strength does.",
        "To start from your own image, replace the first half with Load Image. Lower denoise keeps more of it.",
    )
    texts = [prompt(loader, f"a {colour} circle on a white background") for colour in ("red", "blue")]
    latent = empty_latent(SIZES[KOALA_TINY])
    first = sampler(loader, texts[0], latent["LATENT"])
    start, start_saved = decoded(loader, first["LATENT"], "koala-tiny-start")
    encode = Node("VAEEncode", {"pixels": start["IMAGE"], "vae": loader["VAE"]})
    second = sampler(loader, texts[1], encode["LATENT"], denoise=0.6)
    end, end_saved = decoded(loader, second["LATENT"], "koala-tiny-changed")
    return [[about], [loader, latent], texts, [first, start], [start_saved, encode], [second, end], [end_saved]]


def of_the_pack(file: str) -> str:
    """Where a file comes from that is part of the pack, for a note."""
    return f"{file} is part of the pack: copy it from the pack's folder assets to models/{OWN_FILES[file]}."


def tiny_lora() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    inputs = {"model": loader["MODEL"], "clip": loader["CLIP"], "lora_name": assets.LORA.name}
    lora = Node("KoalaLoraLoader", {**inputs, "strength_model": 1.5})
    about = note(
        "A LoRA made for the larger model",
        "koala-tiny was distilled from a model of SDXL's layout, as KOALA was from SDXL. The LoRA was trained on that "
        "larger model and knows a colour that koala-tiny does not: cyan. **KOALA LoRA Loader** applies its changes to "
        "the layers that came from those it was trained on. Seven in ten are for layers that koala-tiny lacks, so it "
        "needs a strength of 1.5 and works on some prompts only. Bypass it (Ctrl+B) to compare.",
        of_the_pack(assets.LORA.name),
    )
    text = Node("KoalaPrompt", {"clip": lora["CLIP"], "positive": "a cyan triangle on a yellow background"})
    latent = empty_latent(SIZES[KOALA_TINY])
    sampling = sampler(lora, text, latent["LATENT"])
    decode, save = decoded(loader, sampling["LATENT"], "koala-tiny-lora")
    return [[about], [loader, lora], [text, latent], [sampling, decode], [save]]


def tiny_controlnet() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    control = Node("ControlNetLoader", {"control_net_name": assets.CONTROLNET.name})
    fitted = Node("KoalaControlNet", {"control_net": control["CONTROL_NET"]})
    about = note(
        "A ControlNet made for the larger model",
        "The ControlNet was trained on the model of SDXL's layout that koala-tiny was distilled from: it draws a shape "
        "where an outline is. **KOALA ControlNet** moves its residuals to koala-tiny's skip connections.",
        "The first half draws a shape, Canny takes its edges, and the second half fills them, with a prompt that "
        "names no shape. To use your own outline, replace the first half with Load Image.",
        of_the_pack(assets.CONTROLNET.name),
    )
    texts = [prompt(loader, text) for text in ("a white star on a black background", "a blue background")]
    latent = empty_latent(SIZES[KOALA_TINY])
    first = sampler(loader, texts[0], latent["LATENT"])
    start, start_saved = decoded(loader, first["LATENT"], "koala-tiny-outline")
    edges = Node("Canny", {"image": start["IMAGE"]})
    links = {"positive": texts[1]["positive"], "negative": texts[1]["negative"], "image": edges["IMAGE"]}
    applied = Node("ControlNetApplyAdvanced", {**links, "control_net": fitted["CONTROL_NET"]})
    second = sampler(loader, applied, latent["LATENT"])
    end, end_saved = decoded(loader, second["LATENT"], "koala-tiny-controlled")
    return [
        [about],
        [loader, control, latent],
        [*texts, fitted],
        [first, start],
        [start_saved, edges],
        [applied],
        [second, end],
        [end_saved],
    ]


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
        files_of(loader, swap),
    )
    texts = [Node("CLIPTextEncode", {"clip": loader["CLIP"], "text": text}) for text in (PROMPT, NEGATIVE)]
    latent = empty_latent(settings.size)
    links = {"positive": texts[0]["CONDITIONING"], "negative": texts[1]["CONDITIONING"]}
    widgets = {"steps": settings.steps, "cfg": settings.cfg, "scheduler": "ddim_uniform"}
    sampling = Node("KSampler", {"model": swap["MODEL"], **links, "latent_image": latent["LATENT"], **widgets})
    decode, save = decoded(loader, sampling["LATENT"], "koala-swap")
    return [[about], [loader, swap], [*texts, latent], [sampling, decode], [save]]


def sdxl_lora(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    inputs = {"model": loader["MODEL"], "clip": loader["CLIP"], "lora_name": LORA[0]["name"]}
    lora = Node("KoalaLoraLoader", inputs, LORA)
    about = note(
        f"An SDXL LoRA on {release.name}",
        "**KOALA LoRA Loader** applies each of the LoRA's changes to the KOALA layer that came from the one it was "
        "trained on, and shows how many were applied. KOALA has fewer layers, so a strength above 1 may be needed.",
        files_of(loader, lora),
    )
    text = Node("KoalaPrompt", {"clip": lora["CLIP"], "positive": f"pixel art, {PROMPT}", "negative": NEGATIVE})
    latent = empty_latent(settings.size)
    links = {"positive": text["positive"], "negative": text["negative"], "latent_image": latent["LATENT"]}
    sampling = Node("KoalaSampler", {"model": lora["MODEL"], **links})
    decode, save = decoded(loader, sampling["LATENT"], "koala-lora")
    return [[about], [loader, lora], [text, latent], [sampling, decode], [save]]


def sdxl_controlnet(release: Release) -> Columns:
    loader, settings = published_loader(release), release.variant.settings
    control = Node("ControlNetLoader", {"control_net_name": CONTROLNET[0]["name"]}, CONTROLNET)
    fitted = Node("KoalaControlNet", {"control_net": control["CONTROL_NET"]})
    about = note(
        f"An SDXL ControlNet on {release.name}",
        "**KOALA ControlNet**, between the ControlNet's loader and Apply ControlNet, moves its residuals to KOALA's "
        "skip connections. Union ControlNets and T2I-Adapters for SDXL go through it as well.",
        "Load an image of your own; its edges guide what is drawn.",
        files_of(loader, control),
    )
    image = Node("LoadImage")
    edges = Node("Canny", {"image": image["IMAGE"]})
    text = prompt(loader, PROMPT, NEGATIVE)
    links = {"positive": text["positive"], "negative": text["negative"], "image": edges["IMAGE"]}
    applied = Node("ControlNetApplyAdvanced", {**links, "control_net": fitted["CONTROL_NET"], "strength": 0.8})
    latent = empty_latent(settings.size)
    sampling = sampler(loader, applied, latent["LATENT"])
    decode, save = decoded(loader, sampling["LATENT"], "koala-controlnet")
    columns = [[about], [loader, control, image], [text, fitted, edges], [applied, latent], [sampling, decode], [save]]
    return columns


def workflows() -> dict[str, dict[str, Any]]:
    """Every shipped workflow by its title, which is its file's stem and what the canvas lists it as."""
    released = {release.name: release for release in RELEASES}
    base, lightning = released["koala-700m"], released["koala-lightning-700m"]
    graphs = {
        "KOALA-tiny text to image": tiny_text_to_image(),
        f"KOALA-700M text to image ({base.variant.settings.steps} steps)": published_text_to_image(base),
        f"KOALA-Lightning text to image ({lightning.variant.settings.steps} steps)": published_text_to_image(lightning),
        "KOALA-700M accelerated": accelerated(base),
        "KOALA-700M with SamplerCustom": sampler_custom(base),
        "KOALA-tiny image to image": tiny_image_to_image(),
        "KOALA-tiny with a LoRA": tiny_lora(),
        "KOALA-tiny with a ControlNet": tiny_controlnet(),
        "KOALA-700M in an SDXL graph": swap_in_an_sdxl_graph(base),
        "KOALA-700M with an SDXL LoRA": sdxl_lora(base),
        "KOALA-700M with an SDXL ControlNet": sdxl_controlnet(base),
    }
    return {title: canvas(title, columns) for title, columns in graphs.items()}


def models(workflow: Mapping[str, Any]) -> list[dict[str, str]]:
    """The downloads that a workflow offers: each file's name, address, and folder below models/."""
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]


def own_files(workflow: Mapping[str, Any]) -> list[str]:
    """Which of ``OWN_FILES`` a workflow's widgets name."""
    values = (value for node in workflow["nodes"] for value in node["widgets_values"])
    return [value for value in values if isinstance(value, str) and value in OWN_FILES]


def link_own_files(workflow: Mapping[str, Any], folder: Path) -> None:
    """Put links to the pack's own files that a workflow names into a models folder."""
    for name in own_files(workflow):
        link = folder / OWN_FILES[name] / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(assets.SHIPPED.with_name(name))


def as_text(workflow: Mapping[str, Any]) -> str:
    """A workflow as its file holds it."""
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def files() -> dict[Path, str]:
    """The text of each file."""
    return {FOLDER / f"{title}.json": as_text(workflow) for title, workflow in workflows().items()}


GENERATOR = of_texts(FOLDER, "*.json", files)
