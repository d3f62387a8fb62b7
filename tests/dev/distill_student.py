"""A teacher as wide as koala-tiny's, and the students planned from it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from koala_sdxl.distill import student
from koala_sdxl.distill.config import StudentTable
from koala_sdxl.koala.architecture.lineage import Lineage
from koala_sdxl.koala.files.export import unet_config
from tools.synthetic.random_weights import unet_state
from tools.tiny.grow import SDXL_TINY

State = dict[str, torch.Tensor]


def weights() -> State:
    """A random SDXL as wide as koala-tiny."""
    return {name: tensor.float() for name, tensor in unet_state(SDXL_TINY).items()}


def teacher(weights: State) -> UNet2DConditionModel:
    """The U-Net with these weights; nothing trains it."""
    network = UNet2DConditionModel.from_config(unet_config(SDXL_TINY))
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def planned(**table: Any) -> Lineage:
    """The lineage that a configuration's table ``student`` asks for."""
    return student.plan(StudentTable.model_validate(table), SDXL_TINY)
