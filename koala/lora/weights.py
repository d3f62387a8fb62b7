"""The tensors of a LoRA file, read as a plan says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from torch import Tensor

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
    not change or vanish with the file. Modules whose numbers are not finite are left out, and are in the new plan.

    Raises CheckpointError where nothing is left.
    """
    found: dict[str, dict[str, Tensor]] = {}
    faults: dict[str, tuple[Outcome, str]] = {}
    with safe_open(plan.path, framework="pt") as file:
        for module in plan.applied:
            try:
                found[module.name] = {
                    new: _read(file.get_tensor(old), new, module) for old, new in module.names.items()
                }
            except _NotFiniteError as error:
                faults[module.name] = "malformed", f"{error} has numbers that are not finite"
    settled = plan.with_faults(faults)
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
    numbers = stored if stored.itemsize > 1 else stored.float()  # PyTorch does not ask 8-bit floats whether they are
    if not torch.isfinite(numbers).all():
        raise _NotFiniteError(name.removeprefix(module.target + "."))
    if name in module.factors:
        return stored.float() * module.factors[name]
    tensor = stored.clone()
    return tensor.reshape(module.shapes[name]) if name in module.shapes else tensor


class _NotFiniteError(ValueError):
    """Infinity or no number in a tensor; the message is its suffix."""
