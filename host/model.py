"""What a MODEL is: the one place that answers it, for nodes, guards and reports alike."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_patcher
import torch

from ..koala.architecture import keys, layout
from ..koala.architecture.layout import Layout
from ..koala.model_info import ModelFacts, assumed_facts

ATTACHMENT = "koala"
WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
"""Types in which the U-Net's weights can be kept; None leaves the choice to the host (by file and device)."""

FILE_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Types that a U-Net file may have, by the names of ``koala.files.inspect.FLOAT_TYPES``."""


def model_facts(model: comfy.model_patcher.ModelPatcher) -> ModelFacts:
    """The facts attached to a MODEL, or those that can be seen on a KOALA that another node loaded.

    Raises ValueError for a MODEL that is no KOALA.
    """
    attached = model.get_attachment(ATTACHMENT)
    if attached is not None:
        return attached
    seen = network_layout(getattr(model.model, "diffusion_model", None))
    if seen not in layout.KOALA_NAMES:
        raise ValueError(
            f"this MODEL is no KOALA ({type(model.model).__name__}); expected a model from KOALA Checkpoint Loader, or "
            f"a KOALA U-Net from a stock loader. For other models use the stock nodes, or the preset custom."
        )
    return assumed_facts(seen, dtype_name(model.model_dtype()), model.model_size())


def network_layout(network: torch.nn.Module | None) -> Layout | None:
    """The layout of a host model's U-Net, None for anything that is not of SDXL's family."""
    try:
        return keys.read_layout(shapes_of(network.state_dict() if network is not None else {}))[0]
    except (KeyError, ValueError, IndexError):
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """A weight type's name as the loader's choices have it."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(
        dtype, str(dtype).removeprefix("torch.").replace("float8", "fp8")
    )


def shapes_of(weights: Mapping[str, torch.Tensor]) -> dict[str, keys.Shape]:
    """The shape of each tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}
