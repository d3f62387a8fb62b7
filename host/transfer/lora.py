"""LoRA files -> patches on a KOALA MODEL and its CLIP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.hooks
import comfy.lora
from torch import Tensor

from ...koala.architecture.keys import Shape, shapes_of
from ...koala.lora.kinds import BIASES, DORA_SCALE, RESCALE, ROTATION, WHOLE, split
from ...koala.lora.modules import Module, Outcome
from ...koala.lora.origin import TrainedOn
from ...koala.lora.plan import Plan, inspect_lora
from ...koala.lora.report import hook_text_summary, text_summary
from ...koala.lora.weights import Loaded, load
from ...koala.words import message
from ..model import model_facts
from ..protocols import Clip, Hooks, Model
from .adapters import Decomposed, Replaced, Rotated, without_core

Patches = dict[str, Any]
"""ComfyUI's name of a weight or bias -> a patch for it."""


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

    Raises what ``inspect_lora`` raises, CheckpointError where nothing at all would be applied, and ValueError for a
    strength that is not a finite number.
    """
    _require_finite(strength_model=strength_model, strength_clip=strength_clip, fold_removed=fold)
    patched, patched_clip = model.clone(), clip.clone()
    loaded = _read(model, path, trained_on, fold != 0, shapes_of(patched_clip.cond_stage_model.state_dict()))
    taken = set(patched.add_patches(_patches(loaded.unet), strength_model))
    for tensors in loaded.folds:
        taken |= set(patched.add_patches(_patches(tensors), strength_model * fold))
    text = set(patched_clip.add_patches(_patches(loaded.text), strength_clip))
    plan = loaded.plan.with_findings(_left_out(loaded.plan.modules, taken) | _left_out(loaded.plan.text, text))
    plan.require_any()
    return Applied(patched, patched_clip, plan, text_summary(plan))


def hook_lora(
    model: Model, path: Path, strength_model: float, strength_clip: float, trained_on: TrainedOn = "auto"
) -> tuple[Hooks, Plan, str]:
    """A LoRA as core's hooks (scheduled, masked), with the same patches that ``apply_lora`` sets; what will become of
    its modules, and of its text encoder modules in words.

    Raises what ``apply_lora`` raises.
    """
    _require_finite(strength_model=strength_model, strength_clip=strength_clip)
    loaded = _read(model, path, trained_on, False, None)
    hooks = comfy.hooks.create_hook_lora(_patches(loaded.unet), strength_model, strength_clip)
    for hook in hooks.hooks:
        hook.weights_clip = _patches(loaded.text)
        hook.need_weight_init = False  # they are patches already, not a LoRA's tensors
    return hooks, loaded.plan, hook_text_summary(loaded.plan)


def _read(model: Model, path: Path, trained_on: TrainedOn, fold: bool, text: Mapping[str, Shape] | None) -> Loaded:
    facts = model_facts(model)
    return load(inspect_lora(path, facts.layout, trained_on, fold, facts.kept_transformers, text))


def _require_finite(**strengths: float) -> None:
    for name, strength in strengths.items():
        if not math.isfinite(strength):
            raise ValueError(f"{name} is {strength}; expected a finite number, such as 1.0.")


def _patches(tensors: Mapping[str, Tensor]) -> Patches:
    """Patches from a LoRA's tensors under the names of ``koala.lora.kinds``."""
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith((DORA_SCALE, RESCALE))}
    weights = {module: _key(module) for module in (split(name)[0] for name in own)}
    for module in weights:
        if module + ".lokr_t2" in own:
            own = without_core(own, module)
    patches: Patches = comfy.lora.load_lora(own, weights)
    for module, key in weights.items():
        if (norms := tensors.get(module + DORA_SCALE)) is not None:
            patches[key] = Decomposed(set(), (patches[key], norms))
        elif module + ROTATION in tensors:
            patches[key] = Rotated(set(), (patches[key], tensors.get(module + RESCALE)))
        elif (whole := tensors.get(module + WHOLE)) is not None:
            patches[key] = Replaced(set(), (whole,))
    return patches


def _key(module: str, of: str = "weight") -> str:
    """ComfyUI's key of a module's weight or bias, from its name for LoRAs."""
    return f"{module.removeprefix('text_encoders.')}.{of}"


def _left_out(modules: Iterable[Module], taken: set[str]) -> dict[str, tuple[Outcome, str]]:
    """The modules that ComfyUI did not patch, although it was asked to, for ``Plan.with_findings``."""
    return {
        module.name: ("unsupported", message("this version of ComfyUI did not take its patch"))
        for module in modules
        if module.outcome in ("applied", "folded") and not _wanted(module) <= taken
    }


def _wanted(module: Module) -> set[str]:
    """The keys that a module's patches are for."""
    suffixes = {name.removeprefix(module.target) for name in module.names.values()}
    biases = suffixes & set(BIASES)
    parts = (*(["bias"] if biases else []), *(["weight"] if suffixes - biases else []))
    return {_key(module.target, part) for part in parts}
