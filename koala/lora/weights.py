"""The tensors of a LoRA file, read as a plan says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from torch import Tensor

from ..words import message
from .kinds import BIASES, DORA_SCALE, FACTORS
from .modules import Module, Outcome
from .plan import Plan


@dataclass(frozen=True)
class Loaded:
    """A LoRA's tensors on the CPU, under ComfyUI's names, and the plan of what they are."""

    plan: Plan
    unet: Mapping[str, Tensor] = field(repr=False)
    folds: tuple[Mapping[str, Tensor], ...] = field(repr=False)
    """Changes of removed transformer blocks, each group to be applied by itself on top."""
    text: Mapping[str, Tensor] = field(repr=False)


def load(plan: Plan) -> Loaded:
    """Read the tensors of all modules that a plan applies, each copied out of the file: what is patched for long must
    not change or vanish with the file. Modules whose numbers are not finite are left out, and the new plan says so; it
    also says which are applied and change nothing.

    Raises CheckpointError where nothing is left.
    """
    found: dict[str, dict[str, Tensor]] = {}
    findings: dict[str, tuple[Outcome, str]] = {}
    with safe_open(plan.path, framework="pt") as file:
        for module in plan.applied:
            try:
                found[module.name] = {
                    new: _read(file.get_tensor(old), new, module) for old, new in module.names.items()
                }
            except _NotFiniteError as error:
                reason = message("{tensor} has numbers that are not finite", tensor=str(error))
                findings[module.name] = "malformed", reason
                continue
            if _is_idle(module, found[module.name]):
                findings[module.name] = module.outcome, message("its numbers are zeros, so it changes nothing")
    settled = plan.with_findings(findings)
    settled.require_any()

    def together(modules: Iterable[Module]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for module in modules:
            tensors |= found[module.name]
            tensors |= {name: torch.tensor(value, dtype=torch.float64) for name, value in module.numbers.items()}
        return tensors

    return Loaded(
        settled,
        together(module for module in settled.modules if module.outcome == "applied"),
        tuple(together(modules) for modules in settled.folds),
        together(module for module in settled.text if module.outcome == "applied"),
    )


def _read(stored: Tensor, name: str, module: Module) -> Tensor:
    """A tensor as a module's patch has it, in memory of its own."""
    if not torch.isfinite(_comparable(stored)).all():
        raise _NotFiniteError(name.removeprefix(module.target + "."))
    if name in module.factors:
        return stored.float() * module.factors[name]
    tensor = stored.clone()
    return tensor.reshape(module.shapes[name]) if name in module.shapes else tensor


def _is_idle(module: Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a module's change is zero, as its tensors under ComfyUI's names say."""
    parts = {name.removeprefix(module.target): tensor for name, tensor in tensors.items()}
    factors = [_comparable(tensor) for suffix, tensor in parts.items() if suffix in FACTORS]
    if not factors or parts.keys() & {DORA_SCALE, *BIASES}:
        return False
    return 0 in module.numbers.values() or not all(map(torch.any, factors))


def _comparable(tensor: Tensor) -> Tensor:
    """The same numbers in a type that PyTorch compares; it does not compare 8-bit floats."""
    return tensor if tensor.itemsize > 1 else tensor.float()


class _NotFiniteError(ValueError):
    """Infinity or no number in a tensor; the message is its suffix."""
