"""LoRAs that are carried over: from sdxl-tiny with random weights to a koala-tiny that is cut out of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_sdxl.distill.carry import run
from koala_sdxl.distill.carry.settings import Settings
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.architecture.lineage import lineage
from tests.dev import distill_runs
from tools.synthetic import adapters
from tools.tiny.train import SDXL_TINY

FEW: dict[str, Any] = {"size": 64, "samples": 16, "steps": 30, "batch": 8, "dtype": "fp32", "rank": 8}


def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the teacher, the student, prompts and a LoRA of the attention layers."""
    for folder in distill_runs.place(tmp_path_factory):
        whole = load_file(folder / "sdxl-tiny" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        save_file(
            {name: weight.float() for name, weight in lineage(KOALA_TINY).cut(whole, "diffusers").items()},
            folder / "koala-tiny.safetensors",
        )
        colours = ("red", "green", "blue", "yellow")
        (folder / "prompts.txt").write_text("\n".join(f"a cyan star on a {colour} background" for colour in colours))
        (folder / "keep.txt").write_text("\n\n".join(f"a star on a {colour} background" for colour in colours))
        text = adapters.text_lora(2, 32, 128, "lora_te1") | adapters.text_lora(2, 64, 256, "lora_te2")
        unet = adapters.lora(SDXL_TINY, only=adapters.in_attention)
        save_file({name: 0.5 * value for name, value in (unet | text).items()}, folder / "lora.safetensors")
        yield folder


def fine_tuned(place: Path, folder: Path) -> Path:
    """The teacher with other weights: some layers of the U-Net, and one of a text encoder."""
    shutil.copytree(place / "sdxl-tiny", folder)
    for part, layers in (
        ("unet", ("attn2.to_v.weight", "norm2.weight", "conv2.bias")),
        ("text_encoder", ("mlp.fc1.weight",)),
    ):
        (path,) = (folder / part).glob("*.safetensors")
        state = load_file(path)
        generator = torch.Generator().manual_seed(1)
        for name, weight in state.items():
            if name.endswith(layers):
                state[name] = weight + 0.05 * torch.randn(weight.shape, generator=generator).half()
        save_file(state, path, {"format": "pt"})
    return folder


def settings(place: Path, out: str, **changes: Any) -> Settings:
    """A small run's; a test names only what it changes."""
    files = {
        "lora": place / "lora.safetensors",
        "teacher": place / "sdxl-tiny",
        "student": place / "koala-tiny.safetensors",
        "prompts": place / "prompts.txt",
        "out": place / f"{out}.safetensors",
    }
    return Settings(**{**files, **FEW, **changes})


def carried(place: Path, out: str, **changes: Any) -> list[str]:
    """A run in this process; what it says."""
    said: list[str] = []
    run.run(settings(place, out, **changes), said.append)
    return said
