"""Packs a finished koala-tiny folder into the shipped file, with the pack's own loader and ComfyUI's own saver.

Usage: python3 dev.py pack-tiny --model DIR [--out assets/koala-tiny.safetensors]
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from koala_sdxl.koala.files.atomic_write import written_whole
from koala_sdxl.koala.files.conventions import DISTILLATION_KEY
from koala_sdxl.koala.files.header import read_header
from tools import commands
from tools.harness import inprocess
from tools.tiny import autoencoder, denoiser, text

MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.implementation": "sgm",
    "modelspec.title": "koala-tiny",
    "modelspec.description": "KOALA-700M's layout at a tenth of its width; draws coloured shapes",
    "modelspec.license": "Apache-2.0",
    "modelspec.resolution": "128x128",
    "modelspec.prediction_type": "epsilon",
    "koala.variant": "base",
}
UNUSED = {"clip_l.transformer.text_projection.weight"}  # not SDXL's; core creates it, but neither reads nor saves it
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
CONFIGS = {"scheduler": "scheduler_config.json"}


def metadata(folder: Path) -> dict[str, str]:
    """The file's metadata: identity, every model's configuration as diffusers wrote it, the `koala.` metadata of the
    U-Net's file, and the recipes of its training."""
    configs = {part: (folder / part / CONFIGS.get(part, "config.json")).read_text() for part in PARTS}
    facts = {f"koala.config.{part}": json.dumps(json.loads(text)) for part, text in configs.items()}
    (unet,) = (folder / "unet").glob("*.safetensors")
    said = {key: value for key, value in read_header(unet).metadata.items() if key.startswith("koala.")}
    return {**MODELSPEC, **said, **facts, "koala.training": training_facts(DISTILLATION_KEY in said)}


def training_facts(distilled: bool) -> str:
    """The recipes of the stages, as JSON; without the U-Net's where that was ``distilled``."""
    stages = {"autoencoder": autoencoder, "text": text} | ({} if distilled else {"denoiser": denoiser})
    return json.dumps({name: asdict(stage.Recipe()) for name, stage in stages.items()})


def pack(folder: Path, out: Path) -> None:
    """Load the folder with the pack's loader, save it with `comfy.sd.save_checkpoint` in fp16, and load it again.

    Raises ValueError where the file does not load to the weights of the folder."""
    inprocess.activate()
    import comfy.sd

    from koala_sdxl import koala_loader

    model, clip, vae = koala_loader.load_folder(folder, "fp16")
    vae.first_stage_model.half()
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out, replace=True) as aside:
        comfy.sd.save_checkpoint(str(aside), model, clip, vae, metadata=metadata(folder))
        again = koala_loader.load_checkpoint(aside, "fp16")
        for name, first, second in zip(("U-Net", "CLIP", "VAE"), (model, clip, vae), again, strict=True):
            if different := _differences(first, second):
                raise ValueError(f"{out.name}: the {name} loads with other weights than {folder}: {different[:3]}")
        aside.chmod(0o644)  # safetensors makes files that only their owner can read


def _differences(first: Any, second: Any) -> list[str]:
    """Names of tensors that are missing on one side or not equal."""
    one, other = _weights(first), _weights(second)
    return [k for k in one.keys() | other.keys() if k not in one or k not in other or not torch.equal(one[k], other[k])]


def _weights(part: Any) -> dict[str, torch.Tensor]:
    module = getattr(part, "first_stage_model", None) or getattr(part, "cond_stage_model", None) or part.model
    return {name: tensor.float() for name, tensor in module.state_dict().items() if name not in UNUSED}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = commands.parser("pack-tiny").parse_args(argv)
    pack(arguments.model, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
