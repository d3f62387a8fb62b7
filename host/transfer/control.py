"""SDXL's ControlNets and T2I-Adapters on a KOALA: each residual goes to the skip connection it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import comfy.controlnet
from comfy.controlnet import ControlBase, ControlLora, T2IAdapter

from ...koala.architecture.layout import SDXL, name
from ...koala.architecture.lineage import Lineage
from ..model import sampled_lineage
from ..protocols import BaseModel, ControlNet, Residuals

SKIPS = tuple(range(sum(map(len, SDXL.up))))
"""SDXL's skip connections; a ControlNet has a residual for each of the nine."""


class _Adapted:
    """Mixed into a ControlNet's own class: looks at the model that is sampled, and moves residuals to its layers.

    Where the U-Net takes SDXL's residuals, as SDXL itself does, nothing is changed: one ControlNet serves both.
    """

    lineage: Lineage | None
    """Of the model that is sampled; None where its U-Net takes SDXL's residuals."""
    previous_controlnet: ControlNet | None

    def pre_run(self, model: BaseModel, percent_to_timestep_function: Callable[[float], float]) -> None:
        lineage = sampled_lineage(model)
        self.lineage = lineage if lineage is not None and takes_other_residuals(lineage) else None
        super().pre_run(model, percent_to_timestep_function)  # type: ignore[misc]

    def get_control(self, *arguments: Any, **further: Any) -> Residuals | None:
        """This ControlNet's residuals and those of the ones before it, a list for each of input, middle and output."""
        previous = self.previous_controlnet
        before = None if previous is None else previous.get_control(*arguments, **further)
        self.previous_controlnet = None  # so that the class's own code gives this one's residuals alone
        try:
            own: Residuals | None = super().get_control(*arguments, **further)  # type: ignore[misc]
        finally:
            self.previous_controlnet = previous
        if own is not None and self.lineage is not None:
            own = remapped(own, self.lineage)
        if before is None:
            return own
        if self.lineage is not None:
            _require_remapped(before, self.lineage)
        return before if own is None else _merged(own, before)

    def copy(self) -> ControlNet:
        return _mixed(super().copy())  # type: ignore[misc]


def adapt(control: ControlNet) -> ControlNet:
    """A copy of a ControlNet whose residuals fit the KOALA that is sampled with it.

    Raises ValueError for one that was not made for SDXL, or that needs SDXL's own weights.
    """
    if is_adapted(control):
        return control
    _require_sdxl(control)
    return _mixed(control.copy())


def is_adapted(control: ControlNet) -> bool:
    """Whether ``adapt`` made a ControlNet."""
    return isinstance(control, _Adapted)


def takes_other_residuals(lineage: Lineage) -> bool:
    """Whether a U-Net lacks some of the layers that SDXL's residuals are for."""
    return lineage.skips != SKIPS or lineage.student.middle is None


def remapped(own: Mapping[str, list[Any]], lineage: Lineage) -> Residuals:
    """SDXL's residuals as KOALA's U-Net takes them from each list's end.

    ``output`` (ControlNets) holds one for each skip connection, from the first block on; ``input`` (T2I-Adapters) holds
    them from the last block on. A list that is as long as KOALA's own is left as it is: a ControlNet made for KOALA.
    """
    residuals: Residuals = {"input": [], "middle": [], "output": []}
    output, inputs = own.get("output", []), own.get("input", [])
    if output:
        residuals["output"] = output if len(output) == len(lineage.skips) else [output[skip] for skip in lineage.skips]
    if inputs:
        residuals["input"] = [inputs[-1 - skip] if skip < len(inputs) else None for skip in reversed(lineage.skips)]
    if lineage.student.middle is not None:
        residuals["middle"] = own.get("middle", [])
    return residuals


def _merged(own: Residuals, before: Residuals) -> Residuals:
    merged: Residuals = ControlBase().control_merge(own, before, None)
    return merged


def _mixed(control: Any) -> ControlNet:
    control.__class__ = _adapted_class(control.__class__)
    control.lineage = None
    adapted: ControlNet = control
    return adapted


@cache
def _adapted_class(base: type) -> type:
    return type(f"Koala{base.__name__}", (_Adapted, base), {"__module__": __name__})


def _require_remapped(before: Residuals, lineage: Lineage) -> None:
    if max(len(before["output"]), len(before["input"])) > len(lineage.skips):
        raise ValueError(
            f"a ControlNet in this chain has SDXL's residuals, and {name(lineage.student)} has other layers; expected "
            f"every ControlNet to pass through KOALA ControlNet. Put KOALA ControlNet behind each ControlNet loader."
        )


def _require_sdxl(control: ControlNet) -> None:
    if isinstance(control, ControlLora):
        raise ValueError(
            "this ControlNet is a Control-LoRA, which needs the weights of SDXL's complete U-Net; KOALA has only some "
            "of them. Choose the full ControlNet of the same kind."
        )
    if isinstance(control, T2IAdapter):
        if not getattr(control.t2i_model, "xl", False):
            raise ValueError(
                "this T2I-Adapter was made for another model, most likely Stable Diffusion 1.x; expected one for SDXL. "
                "Choose an SDXL T2I-Adapter."
            )
        return
    residuals = getattr(getattr(control, "control_model", None), "zero_convs", None)
    if not isinstance(control, comfy.controlnet.ControlNet) or residuals is None:
        raise ValueError(
            f"this ControlNet was made for another family of models ({type(control).__name__}); expected one for "
            f"SDXL. Choose an SDXL ControlNet or T2I-Adapter."
        )
    if len(residuals) > len(SKIPS):
        raise ValueError(
            f"this ControlNet has {len(residuals)} residuals, so it was made for Stable Diffusion 1.x or 2.x; expected "
            f"an SDXL ControlNet with {len(SKIPS)}. Choose the SDXL version."
        )
