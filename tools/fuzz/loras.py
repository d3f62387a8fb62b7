"""Whether a LoRA's patches hold the tensors of its file, and change as many weights as its report says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import torch

from koala_sdxl.koala.files.header import read_header
from tools.fuzz.bases import Base, Weights, lora_target
from tools.fuzz.tensors import file_tensors

Place = tuple[str, int, int]
"""Patched weight, number of the patch, number of its value."""
Slots = dict[Place, "torch.Tensor | float | int"]


@dataclass(frozen=True)
class Clean:
    """An undamaged LoRA: the file's tensor that each patch's value is, and the modules that are applied."""

    names: Mapping[Place, str]
    applied: frozenset[str]
    files: Mapping[str, torch.Tensor]


def learn(base: Base, path: Path, loaded: Any) -> Clean:
    """The map of an undamaged LoRA, found by the numbers."""
    files = file_tensors(base, path)
    index = {_bytes(tensor): name for name, tensor in reversed(files.items())}
    names = {place: index[_bytes(value)] for place, value in _slots(loaded).items() if _bytes(value) in index}
    return Clean(names, frozenset(_applied(loaded)), files)


def differences(base: Base, clean: Clean, path: Path, loaded: Any) -> Iterator[str]:
    """What of an applied LoRA is not what its file has, or not what its report says."""
    files = file_tensors(base, path)
    present = {_bytes(tensor): name for name, tensor in files.items()}
    used: set[str] = set()
    slots, scale = _slots(loaded), _stated_scale(path)
    for place, value in slots.items():
        name = clean.names.get(place)
        if name in files and _bytes(value) == _bytes(files[name]):
            used.add(name)
        elif other := present.get(_bytes(value)):
            used.add(other)
        elif isinstance(value, torch.Tensor) or name in files or not _is_scale(value, place, slots, scale):
            yield f"{place[0]} is patched with numbers that the file lacks, in the place of {name}"
    applied = _applied(loaded)
    for module in applied:
        parts = [name for name in files if name[1:].startswith((f"{module}.", f"{module}_lora."))]
        if ignored := [name for name in parts if name not in used]:
            yield f"{module} is applied, its {ignored[0]} is not"
    changed = _changed(loaded)
    if changed != len(applied):
        yield f"{len(applied)} modules applied, {changed} changed"
    text = re.match(r"(\d+) of (\d+)", loaded.text)
    said, done = int(text[1]) if text else 0, _changed_text(loaded)
    if said != done:
        yield f"text encoders: {loaded.text}, {done} changed"
    yield from _lost(base, clean, files, loaded, applied)


def _is_scale(value: float, place: Place, slots: Slots, scale: float) -> bool:
    """Whether a number that the file lacks is the alpha that its configuration asks for: a rank, times its scale."""
    beside = [other for where, other in slots.items() if where[:2] == place[:2] and isinstance(other, torch.Tensor)]
    return any(math.isclose(value, size * scale, rel_tol=1e-6) for other in beside for size in other.shape)


def _stated_scale(path: Path) -> float:
    """The scale that PEFT's configuration in a file's header asks for, 1 where there is none."""
    text = read_header(path).metadata.get("lora_adapter_metadata")
    stated = {key.removeprefix("unet."): value for key, value in json.loads(text).items()} if text else {}
    if not stated:
        return 1.0
    rank = stated.get("r", 8)
    return float(stated.get("lora_alpha", 8)) / (math.sqrt(rank) if stated.get("use_rslora") else rank)


def _lost(base: Base, clean: Clean, files: Mapping[str, torch.Tensor], loaded: Any, applied: set[str]) -> Iterator[str]:
    """Modules that the damage did not touch are applied as before; the report may say that the origin is assumed."""
    if loaded.plan.origin and "assumed" in loaded.plan.origin.evidence:
        return
    for module in clean.applied - applied:
        parts = {name for name in clean.files if name[1:].startswith((f"{module}.", f"{module}_lora."))}
        now = {name for name in files if name[1:].startswith((f"{module}.", f"{module}_lora."))}
        if parts == now and all(_equal(files[name], clean.files[name]) for name in parts):
            yield f"{module} is untouched, and not applied"


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.dtype, first.shape, _bytes(first)) == (second.dtype, second.shape, _bytes(second))


def _applied(loaded: Any) -> set[str]:
    return {module.name for module in loaded.plan.modules if module.outcome in ("applied", "folded")}


def _slots(loaded: Any) -> Slots:
    found: Slots = {}
    for patches in (loaded.model.patches, loaded.clip.patcher.patches):
        for key, listed in patches.items():
            for number, patch in enumerate(listed):
                for place, value in enumerate(_values(patch[1])):
                    if isinstance(value, torch.Tensor | float | int) and not isinstance(value, bool):
                        found[str(key), number, place] = value
    return found


def _values(value: Any) -> tuple[Any, ...]:
    """All that a patch holds, of an adapter or of a plain difference."""
    weights = getattr(value, "weights", value)
    flat: list[Any] = []
    for part in weights if isinstance(weights, tuple | list) else (weights,):
        flat += _values(part) if isinstance(part, tuple | list) or hasattr(part, "weights") else [part]
    return tuple(flat)


def _changed(loaded: Any) -> int:
    """How many modules of the U-Net have another weight or bias than before."""
    return _count(loaded.model.patches, loaded.model.model)


def _changed_text(loaded: Any) -> int:
    return _count(loaded.clip.patcher.patches, lora_target()[1].cond_stage_model)


def _count(patches: Mapping[Any, Any], network: torch.nn.Module) -> int:
    state, modules = network.state_dict(), set()
    for key, listed in patches.items():
        name = str(key[0] if isinstance(key, tuple) else key)
        before = state[name].float()
        after = comfy.lora.calculate_weight(listed, before.clone(), name)
        if after.shape != before.shape or not torch.equal(after, before):
            modules.add(name.rpartition(".")[0])
    return len(modules)


def _bytes(value: torch.Tensor | float | int) -> bytes:
    """A number or tensor as bytes; a tensor of one number is the number that an adapter keeps."""
    if not isinstance(value, torch.Tensor):
        return repr(float(value)).encode()
    if value.numel() == 1:
        return repr(float(value)).encode()
    return Weights.of({"": value}).tensors[""].data
