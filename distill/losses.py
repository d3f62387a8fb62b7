"""The losses: error against the true noise, against the teacher's output, and against the teacher's features.

Sources: KOALA (arXiv 2312.04005), which sums squared errors of features over layers, as BK-SDM (arXiv 2305.15798) does
over stages; LAPTOP-Diff (arXiv 2404.11098) for dividing each by its magnitude; min-SNR (arXiv 2303.09556).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.training_utils import compute_snr

from .config import LossTable
from .features import Pair


def time_steps(batch: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [batch], stratified: one from each of ``batch`` equal intervals of 0 to ``total`` - 1. Uniform, with less
    variance than independent samples."""
    return ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * total).long()


def time_weights(table: LossTable, noise: object, time: torch.Tensor) -> torch.Tensor:
    """The weight of task and output error at time steps [n]; float32 [n].

    velocity: 1 / alpha_bar, which turns the noise's error into the velocity's; at most ``most_weight``, then scaled to
    a mean of 1 over all time steps.
    """
    if table.weighting == "none":
        return torch.ones(time.shape, device=time.device)
    if table.weighting == "min-snr":
        ratio = compute_snr(noise, time)
        return ratio.clamp(max=table.gamma) / ratio
    weights = (1 / noise.alphas_cumprod).clamp(max=table.most_weight)  # type: ignore[attr-defined]
    return (weights / weights.mean()).to(time.device)[time]


def feature_error(
    table: LossTable,
    pairs: Sequence[Pair],
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Sum of the mean squared errors of the student's features, weighted by stage; a scalar."""
    total = torch.zeros(())
    for pair in pairs:
        wanted = teacher[pair.teacher].float()
        error = (student[pair.student].float() - wanted).square().mean()
        if table.normalise:
            error = error / wanted.square().mean().clamp(min=1e-12)
        total = total.to(error.device) + table.stage_weights.get(pair.stage, 1.0) * error
    return total


def terms(
    table: LossTable,
    weights: torch.Tensor,
    noise: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    features: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Each term before its factor, as scalars.

    Args:
        table: the table of the configuration.
        weights: of each sample, [n].
        noise: the true noise, [n, 4, h, w].
        student, teacher: their outputs, [n, 4, h, w].
        features: ``feature_error``.
    """

    def error(wanted: torch.Tensor) -> torch.Tensor:
        return ((student.float() - wanted.float()).square().mean(dim=(1, 2, 3)) * weights).mean()

    return {"task": error(noise), "output": error(teacher), "feature": features}


def total(table: LossTable, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum that is minimised; the names of the terms are those of their factors."""
    first, *others = (getattr(table, name) * term for name, term in terms.items())
    return sum(others, first)
