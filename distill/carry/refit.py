"""Further training of a LoRA on stored samples: AdamW, interrupted and resumed at any step.

Each step's samples follow from the seed and the step's number, so that a resumed run takes the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...koala.files.atomic_write import written_whole
from ...koala.lora.fit import Changes
from ..errors import UserError
from .memory import is_shortage
from .samples import Samples
from .settings import CHECKPOINT_EVERY, PER_STEP, Settings
from .student import Student

RATE = 0.02
"""The learning rate as a share of the typical size of the numbers that are trained, so that it suits a LoRA of any
strength and any way to share it out between the factors."""
WARMUP = 20


def refit(
    student: Student, start: Changes, samples: Samples, wanted: Tensor, full: float, given: Settings, path: Path
) -> Changes:
    """The LoRA after ``given.steps`` steps.

    Args:
        student: the KOALA.
        start: the numbers to begin with.
        samples, wanted: noisy latents, and the outputs that are asked for there, weighted as the student's are.
        full: mean square of the wanted change of the output: the unit of the loss.
        given: steps and seed.
        path: of the checkpoint, which a run resumes from.

    Raises UserError where the loss is not finite, or the checkpoint cannot be read.
    """
    numbers = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    typical = {name: _typical(tensor) for name, tensor in start.items()}
    usual = sum(typical.values()) / len(typical)
    groups = [{"params": [one], "peak": RATE * (typical[name] or usual), "lr": 0.0} for name, one in numbers.items()]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    done = _resume(path, numbers, optimiser)
    for step in tqdm(range(done, given.steps), "refit", given.steps, initial=done, unit=" steps", disable=None):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * rate(step, given.steps)
        generator = torch.Generator().manual_seed((given.seed + 1) * 1_000_003 + step)
        some = torch.randperm(len(wanted), generator=generator)[:PER_STEP]
        slopes = student.slopes(
            {name: one.detach() for name, one in numbers.items()}, samples.pick(some), _error(wanted[some], full)
        )
        for name, one in numbers.items():
            one.grad = slopes[name]
        norm = torch.nn.utils.clip_grad_norm_(numbers.values(), math.inf)
        if not norm.isfinite():
            raise UserError(
                f"step {step + 1} of refit: the gradient is not finite; expected numbers. Take --method fit, or fewer "
                f"--steps; {path.parent} holds what was done until then."
            )
        optimiser.step()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == given.steps:
            _save(path, step + 1, numbers, optimiser)
    return {name: one.detach() for name, one in numbers.items()}


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step (from 0): a linear rise, then half a cosine to zero."""
    return min(1.0, (step + 1) / min(WARMUP, steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _error(wanted: Tensor, full: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss's slope by the outputs: of the mean square of what is missing, in units of ``full``."""
    return lambda found, part: 2 * (found - wanted[part]) / (full * wanted.numel())


def _typical(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _save(path: Path, step: int, numbers: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    state = {"step": step, "numbers": dict(numbers), "optimiser": optimiser.state_dict()}
    with written_whole(path, replace=True) as aside:
        torch.save(state, aside)


def _resume(path: Path, numbers: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """Load the checkpoint, if there is one; returns the number of steps done."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, one in numbers.items():
                one.copy_(state["numbers"][name])
        optimiser.load_state_dict(state["optimiser"])
        return int(state["step"])
    except Exception as error:  # torch and pickle each have their own
        if is_shortage(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be loaded ({said}); expected a checkpoint of this run. Delete it, and run again."
        ) from None
