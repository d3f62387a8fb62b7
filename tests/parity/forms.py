"""koala-tiny in every form in which a KOALA may lie on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from koala_sdxl.koala.architecture.keys import Numbering, renaming
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files.conventions import CLIP_PREFIXES, UNET_PREFIX
from tools.measure import parity

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Forms:
    """Paths of the written forms."""

    folder: Path
    old_folder: Path
    bare_diffusers: Path
    bare_comfy: Path
    script: Path


def write(root: Path) -> Forms:
    """Write koala-tiny in every form below ``root``; its weights are exact in fp16, so all hold the same numbers."""
    state = load_file(parity.koala_loader.BUILT_IN)
    forms = Forms(
        root / "diffusers" / "new",
        root / "diffusers" / "old",
        root / "bare_diffusers.safetensors",
        root / "bare_comfy.safetensors",
        root / "script.safetensors",
    )
    pipeline = parity.reference.pipeline(parity.koala_loader.BUILT_IN)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.half()
    pipeline.save_pretrained(forms.folder, variant="fp16")
    pipeline.save_pretrained(forms.old_folder)
    for encoder in ("text_encoder", "text_encoder_2"):
        _toggle_prefix(forms.old_folder / encoder / "model.safetensors")
    save_file(_unet(state, "diffusers"), forms.bare_diffusers)
    save_file(_unet(state, "comfy"), forms.bare_comfy)
    save_file(as_script(state), forms.script)
    return forms


def as_script(state: State) -> State:
    """What diffusers' SDXL conversion script makes of koala-tiny: its block numbers, its upright projection."""
    others = {name: tensor for name, tensor in state.items() if not name.startswith(UNET_PREFIX)}
    projection = others.pop(f"{CLIP_PREFIXES[1]}model.text_projection")
    others[f"{CLIP_PREFIXES[1]}model.text_projection.weight"] = projection.T.contiguous()
    return others | {UNET_PREFIX + name: tensor for name, tensor in _unet(state, "script").items()}


def _unet(state: State, numbering: Numbering) -> State:
    return {name: state[UNET_PREFIX + comfy] for comfy, name in renaming(KOALA_TINY, "comfy", numbering).items()}


def _toggle_prefix(path: Path) -> None:
    """transformers 4 writes text encoders with ``text_model.``, transformers 5 some of them without: make the other."""
    state = load_file(path)
    prefixed = any(name.startswith("text_model.") for name in state)

    def other(name: str) -> str:
        if name.startswith("text_projection"):
            return name
        return name.removeprefix("text_model.") if prefixed else f"text_model.{name}"

    save_file({other(name): tensor for name, tensor in state.items()}, path)
