"""What the shipped graphs are made of: loaders with their downloads, and the nodes from a prompt to a file."""

from __future__ import annotations

from typing import Any

from koala_sdxl.koala.releases import Release
from tools.generate.canvas import Columns, Node, Output

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


def prompt(loader: Node, positive: str, negative: str = "") -> Node:
    return Node("KoalaPrompt", {"clip": loader["CLIP"], "positive": positive, "negative": negative})


def empty_latent(side: int) -> Node:
    return Node("EmptyLatentImage", {"width": side, "height": side})


def sampler(model: Output, text: Node, latent: Output, **widgets: Any) -> Node:
    links = {"positive": text["positive"], "negative": text["negative"], "latent_image": latent}
    return Node("KoalaSampler", {"model": model, **links, **widgets})


def decoded(loader: Node, latent: Output, prefix: str) -> tuple[Node, Node]:
    """From a latent to a file: VAE Decode, Save Image."""
    decode = Node("VAEDecode", {"samples": latent, "vae": loader["VAE"]})
    return decode, Node("SaveImage", {"images": decode["IMAGE"], "filename_prefix": prefix})


def text_to_image(loader: Node, text: Node, side: int, prefix: str, notes: list[Node]) -> Columns:
    """The graph that begins with notes and a loader, and ends with a file."""
    latent = empty_latent(side)
    sampling = sampler(loader["MODEL"], text, latent["LATENT"])
    info = Node("KoalaModelInfo", {"model": loader["MODEL"]})
    decode, save = decoded(loader, sampling["LATENT"], prefix)
    return [notes, [loader, info], [text, latent], [sampling, decode], [save]]
