"""What a cached latent or embedding depends on beside its image and caption: digests of the teacher's other models.

The U-Net is left out: fine-tunes that share text encoders and VAE can share a cache. Contents are read in full, two
seconds for SDXL in fp16: two fine-tunes agree in names, shapes and sizes, and a copy has another time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from ..koala.files.conventions import CLIP_PREFIXES, VAE_PREFIX
from . import tokenizer
from .config import TeacherTable

FOLDERS = {"text encoders": ("text_encoder", "text_encoder_2"), "VAE": ("vae",)}
PREFIXES = {"text encoders": CLIP_PREFIXES, "VAE": (VAE_PREFIX,)}
CHUNK = 1 << 22


def of_encoders(table: TeacherTable, vocabulary_folder: Path) -> dict[str, str]:
    """Name -> digest of everything of a teacher that its encoders use.

    Raises UserError as ``tokenizer.read_files`` does, and OSError or SafetensorError for weights that cannot be read.
    """
    model = table.model
    if model.is_file():
        found = {name: _tensors(model, prefixes) for name, prefixes in PREFIXES.items()}
    else:
        found = {name: _files(file for one in names for file in used(model / one)) for name, names in FOLDERS.items()}
    vocabulary = tokenizer.read_files(vocabulary_folder)
    words = hashlib.blake2b(b"".join(vocabulary[name] for name in sorted(vocabulary)), digest_size=8).hexdigest()
    return {**found, "tokenizer": words, "LoRAs": _files(table.loras)}


def used(folder: Path) -> list[Path]:
    """The settings and the weights of a model's folder that diffusers reads: safetensors, in fp16 where there are such,
    or else whatever is there."""
    weights = sorted(folder.glob("*.safetensors"))
    half = [path for path in weights if path.name.endswith(".fp16.safetensors")]
    return [*sorted(folder.glob("*.json")), *(half or weights or sorted(folder.glob("*.bin")))]


def _files(paths: Iterable[Path]) -> str:
    whole = hashlib.blake2b(digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                whole.update(chunk)
    return whole.hexdigest()


def _tensors(path: Path, prefixes: Iterable[str]) -> str:
    """A digest of the tensors of a file whose names begin with one of these."""
    whole = hashlib.blake2b(digest_size=8)
    with safe_open(path, framework="pt") as file:
        for name in sorted(key for key in file.keys() if key.startswith(tuple(prefixes))):  # noqa: SIM118
            tensor = file.get_tensor(name)
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()
