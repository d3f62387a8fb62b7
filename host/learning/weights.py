"""The weights of a MODEL's U-Net with its patches, and what one SDXL's differ by from another's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from torch import Tensor

from ...koala.architecture.lineage import Lineage
from ..protocols import Model

UNET = "diffusion_model."
"""What the names of a U-Net's weights begin with in ComfyUI."""


class Weights:
    """A MODEL's U-Net weights with its patches, each computed when it is asked for; the MODEL stays as it is.

    Patches of every kind are merged in fp32, as ComfyUI merges them, and not rounded to the MODEL's own type.
    """

    def __init__(self, model: Model) -> None:
        self._patches: dict[str, list[Any]] = model.get_key_patches(UNET)

    def __getitem__(self, name: str) -> Tensor:
        """A weight by its name in ComfyUI's numbering; fp32, on the CPU, a copy."""
        (weight, convert), *patches = self._patches[UNET + name]
        copied = comfy.model_management.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
        merged: Tensor = comfy.lora.calculate_weight(patches, convert(copied, inplace=True), UNET + name)
        return merged.detach()

    def shares(self, name: str, other: Weights) -> bool:
        """Whether another MODEL's weight of that name is the very same one, without patches on either."""
        own, others = self._patches[UNET + name], other._patches[UNET + name]
        return len(own) == len(others) == 1 and own[0][0] is others[0][0]


def quantised_by(model: Model) -> str | None:
    """What a MODEL's U-Net has besides weights and biases, such as the scales of quantised ones, whose patches ComfyUI
    does not hand out; None for nothing."""
    kinds = ("weight", "bias")
    names = model.model.diffusion_model.state_dict()
    return next((name for name in names if name.rpartition(".")[2] not in kinds), None)


def differences(plain: Weights, changed: Weights, lineage: Lineage) -> Iterator[tuple[str, Tensor]]:
    """What is added by lineage to each weight and bias of a KOALA, by diffusers' name; fp32, one at a time.

    Args:
        plain: an SDXL's.
        changed: those of the same SDXL with LoRAs, or fine-tuned. What is equal in both is left out.
        lineage: the KOALA's.

    Raises ValueError for a difference that is not finite.
    """
    for part, whole in lineage.tensors:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not plain.shares(whole.comfy, changed):
            change = changed[whole.comfy] - plain[whole.comfy]
            if not change.isfinite().all():
                raise ValueError(
                    f"the difference of sdxl_changed and sdxl is not finite in {UNET}{whole.comfy}; expected numbers. "
                    f"Connect other models, or take another strength of the LoRA."
                )
            if change.any():
                yield part.diffusers, change
