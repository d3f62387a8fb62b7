"""LoRAs and a ControlNet that are carried over: to koala-tiny from an SDXL that it might have been cut out of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from koala_sdxl.distill.carry import run
from koala_sdxl.distill.carry.samples import Samples, Texts
from koala_sdxl.distill.carry.settings import Settings
from koala_sdxl.distill.study.addon_pictures import outlines
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.architecture.lineage import lineage
from tools.harness import testhost
from tools.measure import reference
from tools.synthetic import adapters
from tools.tiny import SHIPPED, denoiser, pipeline, text
from tools.tiny.grow import SDXL_TINY, grown
from tools.tiny.pictures import random_drawings

State = dict[str, torch.Tensor]
LITTLE = 0.1
"""What the layers that koala-tiny lacks add, as a share of what they would with PyTorch's initial weights."""
KEPT = {adapters.NAMINGS["kohya, LDM blocks"].module(whole) for _, whole in lineage(KOALA_TINY).tensors}
"""The LoRA's names of the modules that koala-tiny has."""
FEW: dict[str, Any] = {"size": 64, "samples": 16, "steps": 30, "batch": 16, "dtype": "fp32", "rank": 8}


def strength(name: str) -> float:
    """Factor of a LoRA's tensor: much of its effect is that of layers which koala-tiny lacks."""
    if "lora_up" not in name:
        return 1.0
    return 0.3 if name.startswith("lora_te") or name.partition(".")[0] in KEPT else 1.5


def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the teacher, the student, prompts and a LoRA of the attention layers."""
    folder = tmp_path_factory.mktemp("carry")
    shipped = reference.pipeline(SHIPPED)
    koala = shipped.unet.state_dict()
    save_file({name: weight.clone() for name, weight in koala.items()}, folder / "koala-tiny.safetensors")
    unet = denoiser.new_unet(SDXL_TINY)
    unet.load_state_dict(grown(koala, LITTLE))
    encoders, vocabulary = text.Encoders(shipped.text_encoder, shipped.text_encoder_2), testhost.test_host().tokenizer
    teacher = pipeline.assemble(shipped.vae, encoders, text.tokenizers(vocabulary), unet)
    pipeline.save(teacher, folder / "sdxl-tiny")
    colours = ("red", "green", "blue", "yellow")
    (folder / "prompts.txt").write_text("\n".join(f"a star on a {colour} background" for colour in colours))
    texts = adapters.text_lora(2, 32, 128, "lora_te1") | adapters.text_lora(2, 64, 256, "lora_te2")
    lora = adapters.lora(SDXL_TINY, only=adapters.in_attention) | texts
    save_file({name: value * strength(name) for name, value in lora.items()}, folder / "lora.safetensors")
    yield folder
    shutil.rmtree(folder)


def fine_tuned(place: Path, folder: Path) -> Path:
    """The teacher with other weights: some layers of the U-Net, and of each text encoder."""
    shutil.copytree(place / "sdxl-tiny", folder)
    for part, layers in (
        ("unet", ("attn2.to_v.weight", "norm2.weight", "conv2.bias")),
        ("text_encoder", ("mlp.fc1.weight", "token_embedding.weight", "q_proj.bias")),
        ("text_encoder_2", ("mlp.fc1.weight", "final_layer_norm.weight", "text_projection.weight")),
    ):
        (path,) = (folder / part).glob("*.safetensors")
        state = load_file(path)
        generator = torch.Generator().manual_seed(1)
        for name, weight in state.items():
            if name.endswith(layers):
                state[name] = weight + 0.05 * torch.randn(weight.shape, generator=generator).half()
        save_file(state, path, {"format": "pt"})
    return folder


def outlines_in(folder: Path, count: int) -> Path:
    """A folder of control images for koala-tiny's ControlNet: white outlines on black, PNG, JPEG and WebP in turn."""
    folder.mkdir()
    drawings = random_drawings(count, torch.Generator().manual_seed(7))
    for number, pixels in enumerate(outlines(drawings, 64)):
        image = Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy())
        image.save(folder / f"{number:02}.{('png', 'jpg', 'webp')[number % 3]}")
    return folder


def texts(prompts: int) -> Texts:
    """Random embeddings in place of the text encoders' for sdxl-tiny, and the zeros of the empty prompt."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(prompts + 1, 77, 96, generator=generator), torch.randn(prompts + 1, 64, generator=generator)
    for rows in pair:
        rows[-1] = 0
    return Texts(pair, pair)


class Line:
    """A student whose outputs are its one matrix times the noisy latents; ``counts``: of samples, in each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def slopes(self, changes: State, samples: Samples, error: Callable[[Any, Any], Any]) -> State:
        """As ``Student.slopes``."""
        self.counts.append(len(samples.noisy))
        found = samples.noisy @ changes["layer"].T
        return {"layer": error(found, torch.arange(len(found))).T @ samples.noisy}


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
