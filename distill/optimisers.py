"""The optimisers of a run: AdamW, and bitsandbytes' AdamW with moments of 8 bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch

from .config import TrainingTable
from .errors import UserError

PACKAGE = "bitsandbytes"


def require_installed(table: TrainingTable, sharded: bool) -> None:
    """Raises UserError where the optimiser cannot be made: for 8 bits without a package, or of a sharded student; and
    where a student's layout in memory cannot be sharded."""
    if table.channels_last and sharded:
        raise UserError(
            "training.channels_last does not shard; expected false under FSDP, which takes weights in PyTorch's own "
            "order only. Change it, or train with distill/ddp.yaml."
        )
    if table.optimiser == "adamw-8bit":
        _eight_bit()
        if sharded:
            raise UserError(
                'training.optimiser = "adamw-8bit" does not shard; expected "adamw" under FSDP, which spreads its '
                "moments over the GPUs. Change it, or train with distill/ddp.yaml."
            )


def made(table: TrainingTable, weights: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of ``training.optimiser``. Raises UserError as ``require_installed`` does."""
    settings: dict[str, Any] = {"lr": table.learning_rate, "betas": table.betas, "weight_decay": table.weight_decay}
    if table.optimiser == "adamw":
        return torch.optim.AdamW(weights, **settings, fused=True)
    return _eight_bit()(weights, **settings)


def _eight_bit() -> Callable[..., torch.optim.Optimizer]:
    if find_spec(PACKAGE) is None:
        raise UserError(
            f'training.optimiser = "adamw-8bit": the package {PACKAGE} is not installed; expected it. Run pip install '
            f'{PACKAGE}, or set it to "adamw".'
        )
    found: Callable[..., torch.optim.Optimizer] = importlib.import_module(f"{PACKAGE}.optim").AdamW8bit
    return found


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give an optimiser the learning rate of the next step."""
    for group in optimiser.param_groups:
        group["lr"] = rate
