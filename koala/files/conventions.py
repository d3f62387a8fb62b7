"""Names that KOALA files use: tensor prefixes in single-file checkpoints, files of a folder, metadata keys."""

from __future__ import annotations

from pathlib import Path

UNET_PREFIX = "model.diffusion_model."
CLIP_PREFIXES = ("conditioner.embedders.0.", "conditioner.embedders.1.")
"""Of CLIP-L (transformers' names) and CLIP-G (open_clip's names)."""
CLIP_NETWORKS = ("transformer.", "model.")
"""What follows these prefixes in the names of the two networks' tensors."""
VAE_PREFIX = "first_stage_model."

SCHEDULER_KEY = "koala.config.scheduler"
"""Metadata in which a single file carries what a folder has in scheduler_config.json, as JSON."""
KEPT_TRANSFORMERS_KEY = "koala.transformers"
"""Metadata in which a student of one's own says which of SDXL's transformer blocks it kept, as JSON: attention module
-> list of SDXL's indices, as in ``lineage.KEPT_TRANSFORMERS``."""
SETTINGS_KEY = "koala.settings"
"""Metadata in which a model asks for other settings than its variant's, as JSON: steps, cfg and spacing."""
DISTILLATION_KEY = "koala.distillation"
"""Metadata that says, as JSON, how a student was trained: teacher, LoRAs, layout, start, steps, batch and loss."""
CARRY_KEY = "koala.carry"
"""Metadata that says, as JSON, what a LoRA or ControlNet came from: files with SHA-256, settings, shares reached."""

WEIGHT_NAMES = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors")
TEXT_NAMES = ("model.fp16.safetensors", "model.safetensors")
FOLDER_PARTS = {"unet": WEIGHT_NAMES, "text_encoder": TEXT_NAMES, "text_encoder_2": TEXT_NAMES, "vae": WEIGHT_NAMES}
"""Folder of each model in a diffusers folder -> file names of its weights, the preferred one first."""
PEFT_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAMES = (PEFT_WEIGHTS, "pytorch_lora_weights.safetensors")
"""The names that PEFT and diffusers give to every adapter that they save, each in a folder of its own."""


def label(path: Path) -> str:
    """A file's name for messages, with its folders where it has a name that many have."""
    if path.name in ADAPTER_NAMES:
        return f"{folder_label(path.parent)}/{path.name}"
    if path.name not in FOLDER_PARTS.get(path.parent.name, ()):
        return path.name
    return "/".join(part for part in (folder_label(path.parent.parent), path.parent.name, path.name) if part)


def folder_label(folder: Path) -> str:
    """A folder's name for messages; for a snapshot in Hugging Face's cache, whose own name is a hash, the repository.

    That is ``models--owner--repository/snapshots/hash``.
    """
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def folders_above(path: Path) -> tuple[str, ...]:
    """Names of the folders that a file or folder lies in, the nearest first; then of those that a link leads to."""
    chosen, real = path.parent, path.resolve()
    followed = () if real.parent == chosen else reversed(real.parts)
    return (*reversed(chosen.parts), *followed)
