"""KOALA-700M with random weights in a folder that diffusers loads, too: the files of
tools.synthetic.random_weights, linked, and the configurations beside them."""

from __future__ import annotations

from pathlib import Path

from koala_sdxl.koala.architecture.component_detection import read_text_encoder
from koala_sdxl.koala.files import export
from koala_sdxl.koala.files.inspect import inspect_folder
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from tools.harness import testhost
from tools.synthetic import random_weights


def link(target: Path, model: str = "koala-700m") -> Path:
    """Lay the folder out below ``target`` and return it. ``model``: a folder of ``random_weights``."""
    made = inspect_folder(random_weights.folder(model))
    sources = {
        "unet/diffusion_pytorch_model": made.model.unet.path,
        "text_encoder/model": made.text_encoder.path,
        "text_encoder_2/model": made.text_encoder_2.path,
        "vae/diffusion_pytorch_model": made.vae.path,
    }
    folder = target / model
    for name, file in sources.items():
        place = folder / f"{name}.fp16.safetensors"
        place.parent.mkdir(parents=True)
        place.symlink_to(file)
    texts = {"text_encoder": made.text_encoder, "text_encoder_2": made.text_encoder_2}
    sizes = {part: read_text_encoder(file.shapes) for part, file in texts.items()}
    configs = {
        "model_index.json": export.MODEL_INDEX,
        "scheduler/scheduler_config.json": {**SCHEDULER_CONFIG, "_class_name": "EulerDiscreteScheduler"},
        "unet/config.json": export.unet_config(made.model.unet.layout),
        **{f"{part}/config.json": export.text_config(part, size) for part, size in sizes.items()},
        "vae/config.json": export.vae_config(made.vae.sizes, 1024),
    }
    vocabulary = testhost.test_host().tokenizer
    words = {file.name: file.read_bytes() for file in vocabulary.iterdir()}
    contents = {name: export.as_json(config) for name, config in configs.items()}
    for part, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        contents |= {f"{part}/{name}": data for name, data in export.tokenizer_files(words, padding).items()}
    for name, data in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_once(folder: Path) -> None:
    """Bring a folder's files into the page cache, so that no engine pays for the disk."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
