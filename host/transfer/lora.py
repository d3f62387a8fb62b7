"""LoRA files -> patches on a KOALA MODEL and its CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import comfy.hooks
import comfy.lora
import comfy.utils

from ...koala.files.header import CheckpointError
from ...koala.lora.names import renamed
from ...koala.lora.origin import TrainedOn
from ...koala.lora.plan import Plan, inspect_lora
from ..model import model_facts
from ..protocols import Clip, Hooks, Model


class Applied(NamedTuple):
    """A MODEL and a CLIP with a LoRA, what became of each of its modules, and of its text encoder modules in words."""

    model: Model
    clip: Clip
    plan: Plan
    text: str


def apply_lora(
    model: Model,
    clip: Clip,
    path: Path,
    strength_model: float,
    strength_clip: float,
    fold: float = 0.0,
    trained_on: TrainedOn = "auto",
) -> Applied:
    """Clones of MODEL and CLIP with a LoRA file applied. ``fold`` is the weight with which changes of removed
    transformer blocks are merged into the nearest block that was kept, 0 leaves them out.

    Raises what ``inspect_lora`` raises, and CheckpointError where nothing at all would be applied.
    """
    plan, weights = _read(model, path, trained_on, fold != 0)
    patched, patched_clip = model.clone(), clip.clone()
    unet_keys = comfy.lora.model_lora_keys_unet(patched.model, {})
    for names, strength in ((plan.names, 1.0), *((names, fold) for names in plan.folds)):
        loaded = comfy.lora.load_lora(renamed(weights, names), unet_keys)
        patched.add_patches(loaded, strength_model * strength)
    text_keys = comfy.lora.model_lora_keys_clip(patched_clip.cond_stage_model, {})
    text = comfy.lora.load_lora({key: weights[key] for key in plan.text}, text_keys, log_missing=False)
    applied = len(patched_clip.add_patches(text, strength_clip))
    if not (plan.names or plan.folds or applied):
        raise CheckpointError(
            f"{plan.file}: none of its {plan.text_modules} modules matches these text encoders, and it has none for "
            f"the U-Net; expected a LoRA for SDXL or for KOALA. Leave this LoRA out."
        )
    return Applied(patched, patched_clip, plan, f"{applied} of {plan.text_modules} applied" if plan.text else "none")


def hook_lora(
    model: Model, path: Path, strength_model: float, strength_clip: float, trained_on: TrainedOn = "auto"
) -> tuple[Hooks, Plan, str]:
    """A LoRA as core's hooks (scheduled, masked), under names that core itself maps to the right KOALA layers; what
    will become of its modules, and of its text encoder modules in words."""
    plan, weights = _read(model, path, trained_on, False)
    named = renamed(weights, plan.names) | {key: weights[key] for key in plan.text}
    text = f"{plan.text_modules} for the CLIP that the hooks are set on" if plan.text else "none"
    return comfy.hooks.create_hook_lora(named, strength_model, strength_clip), plan, text


def _read(model: Model, path: Path, trained_on: TrainedOn, fold: bool) -> tuple[Plan, dict[str, Any]]:
    facts = model_facts(model)
    plan = inspect_lora(path, facts.layout, trained_on, fold, facts.kept_transformers)
    return plan, comfy.utils.load_torch_file(str(path), safe_load=True)
