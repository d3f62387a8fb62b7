"""The guard on a KOALA MODEL: whichever node samples it, add-ons that go by SDXL's numbers are refused first.

It is a wrapper around ComfyUI's sampling, so it goes wherever the MODEL goes: into clones, behind LoRAs and merges,
into every guider. It holds nothing; what is sampled it takes from the guider that it is called with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..protocols import Executor, Guider, Model
from .compatibility import require_compatible
from .control import watch

KEY = "koala_guard"
"""Key of the wrapper. The beginning ``koala_`` tells KOALA Accelerate that it is the same at every noise level."""
WATCH_KEY = "koala_residuals"
"""Key of the wrapper that one run's U-Net gets for ControlNets that only their residuals tell something of."""

Wrappers = dict[str, dict[Any, list[Any]]]
"""A MODEL's wrappers: where they are called -> key of the node that set them -> functions."""


def guarded(model: Model) -> Model:
    """A clone of a MODEL with the guard; a MODEL that has it already is returned itself."""
    if KEY in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        return model
    clone = model.clone()
    clone.wrappers = with_guard(clone.wrappers)
    return clone


def with_guard(wrappers: Mapping[str, Mapping[Any, list[Any]]]) -> Wrappers:
    """A MODEL's wrappers and the guard, which is called before all others around sampling."""
    others = wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    return {**wrappers, WrappersMP.OUTER_SAMPLE: {KEY: [check], **others}}  # type: ignore[dict-item]


def check(executor: Executor, *arguments: Any, **further: Any) -> torch.Tensor:
    """Sample what ``require_compatible`` lets pass. ComfyUI calls this with the arguments of a guider's
    ``outer_sample``, before it loads anything onto the device.

    Raises ValueError as ``require_compatible`` does.
    """
    guider: Guider = executor.class_obj
    conds = [cond for listed in guider.conds.values() for cond in listed]
    model, options = guider.model_patcher, guider.model_options  # these options are this run's own
    if unknown := require_compatible(model, options, conds):
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, WATCH_KEY, watch(model, unknown), options, True)
    return executor(*arguments, **further)
