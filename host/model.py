"""What a MODEL is: its facts, its layout and which SDXL layer each of its layers came from.

Every node, check and report asks here, so that they cannot disagree. What the loader attached counts first, and in it
what the model's file says it kept of SDXL's transformer blocks; a KOALA U-Net from a stock loader goes by its shapes.
"""

from __future__ import annotations

import torch

from ..koala.architecture import layout
from ..koala.architecture.detection import find_layout
from ..koala.architecture.keys import shapes_of
from ..koala.architecture.layout import SDXL, Layout
from ..koala.architecture.lineage import Lineage, is_teacher, lineage
from ..koala.files.dtypes import TORCH_DTYPES, dtype_name
from ..koala.model_info import ModelFacts, assumed_facts
from .protocols import BaseModel, Model

ATTACHMENT = "koala"
"""Key of the ``ModelFacts`` that travel with a MODEL."""

WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    **{chosen: TORCH_DTYPES[chosen] for chosen in ("fp16", "bf16", "fp8_e4m3fn")},
}
"""Types in which the U-Net's weights can be kept; None leaves the choice to the host (by file and device)."""


def attached_facts(model: Model) -> ModelFacts | None:
    """The facts that KOALA Checkpoint Loader attached to a MODEL; None for a MODEL from another loader."""
    facts: ModelFacts | None = model.get_attachment(ATTACHMENT)
    return facts


def model_facts(model: Model) -> ModelFacts:
    """The attached facts, or those that the shapes of a KOALA from another loader tell.

    Raises ValueError for a MODEL that is not a KOALA model.
    """
    facts = attached_facts(model)
    if facts is not None:
        return facts
    found = unet_layout(model)
    if found not in layout.KOALA_NAMES:
        raise ValueError(
            f"this MODEL is not a KOALA model ({type(model.model).__name__}); expected one from KOALA Checkpoint "
            f"Loader, or a KOALA U-Net from a stock loader. For other models use the stock nodes, or the preset custom."
        )
    return assumed_facts(found, dtype_name(model.model_dtype()), model.model_size())


def is_koala(model: Model) -> bool:
    """Whether ``model_facts`` has an answer for a MODEL."""
    return attached_facts(model) is not None or unet_layout(model) in layout.KOALA_NAMES


def unet_layout(model: Model) -> Layout | None:
    """The layout of a MODEL's U-Net, SDXL itself included; None for anything that is not of SDXL's family."""
    return _layout(getattr(model.model, "diffusion_model", None))


def described(model: Model) -> str:
    """What a MODEL is that was expected to be SDXL, for an error."""
    found = unet_layout(model)
    if found is None:
        return f"not SDXL ({type(model.model).__name__})"
    if attached_facts(model) is not None:
        return f"already a KOALA model ({layout.name(found)})"
    if is_teacher(found):
        return (
            f"an SDXL of other sizes (text width {found.context}, {found.channels[0]} channels, "
            f"{found.in_channels} input channels)"
        )
    return layout.name(found)


def sampled_lineage(model: BaseModel) -> Lineage | None:
    """The lineage of the MODEL that is being sampled; ComfyUI hands ControlNets its inner model only.

    None for a U-Net that is not of SDXL's family, or that has all of SDXL's skip connections (SSD-1B, an inpainting
    SDXL). Raises ValueError for any other that cannot be cut out of SDXL.
    """
    patcher: Model | None = getattr(model, "current_patcher", None)
    facts = attached_facts(patcher) if patcher is not None else None
    if facts is not None:
        return facts.lineage
    found = _layout(model.diffusion_model)
    if found is None or sum(map(len, found.up)) == sum(map(len, SDXL.up)):
        return None
    return lineage(found)


def _layout(network: torch.nn.Module | None) -> Layout | None:
    found = find_layout(shapes_of(network.state_dict())) if network is not None else None
    return found[0] if found else None
