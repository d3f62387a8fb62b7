"""SDXL's ControlNets and T2I-Adapters on a KOALA: each residual goes to the skip connection it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from comfy.controlnet import ControlBase, ControlLora, ControlNet, T2IAdapter

from ...koala.architecture.layout import SDXL, name
from ...koala.architecture.lineage import Lineage, lineage
from ..model import network_layout

Residuals = dict[str, list[Any]]
SKIPS = sum(map(len, SDXL.up))  # nine skip connections, and a ControlNet has a residual for each


class _Adapted:
    """Mixed into a ControlNet's own class: looks at the model that is sampled, and carries residuals to its layers.

    On SDXL itself nothing is changed, so that one ControlNet serves both.
    """

    line: Lineage | None

    def pre_run(self: Any, model: Any, percent_to_timestep_function: Any) -> None:
        layout = network_layout(model.diffusion_model)
        # a U-Net with all of SDXL's skip connections, SDXL itself or SSD-1B, takes SDXL's residuals as they are
        self.line = None if layout is None or sum(map(len, layout.up)) == SKIPS else lineage(layout)
        super().pre_run(model, percent_to_timestep_function)  # type: ignore[misc]

    def get_control(self: Any, *arguments: Any, **further: Any) -> Residuals | None:
        """This ControlNet's residuals and those of the ones before it, a list for each of input, middle and output."""
        previous = self.previous_controlnet
        before = None if previous is None else previous.get_control(*arguments, **further)
        self.previous_controlnet = None  # so that the class's own code gives this one's residuals alone
        try:
            own = super().get_control(*arguments, **further)  # type: ignore[misc]
        finally:
            self.previous_controlnet = previous
        if own is not None and self.line is not None:
            own = carried(own, self.line)
        if before is None:
            return own
        if self.line is not None:
            _require_carried(before, self.line)
        return before if own is None else ControlBase().control_merge(own, before, None)

    def copy(self: Any) -> Any:
        return _mixed(super().copy())  # type: ignore[misc]


def adapt(control: Any) -> Any:
    """A copy of a ControlNet whose residuals fit the KOALA that is sampled with it.

    Raises ValueError for one that was not made for SDXL, or that needs SDXL's own weights.
    """
    if isinstance(control, _Adapted):
        return control
    _require_sdxl(control)
    return _mixed(control.copy())


def is_adapted(control: Any) -> bool:
    return isinstance(control, _Adapted)


def carried(own: Mapping[str, list[Any]], line: Lineage) -> Residuals:
    """SDXL's residuals as KOALA's U-Net takes them from each list's end.

    ``output`` (ControlNets) holds one for each skip connection, from the first block on; ``input`` (T2I-Adapters) holds
    them from the last block on. A list that is as long as KOALA's own is left as it is: a ControlNet made for KOALA.
    """
    found: Residuals = {"input": [], "middle": [], "output": []}
    output, inputs = own.get("output", []), own.get("input", [])
    if output:
        found["output"] = output if len(output) == len(line.skips) else [output[skip] for skip in line.skips]
    if inputs:
        found["input"] = [inputs[-1 - skip] if skip < len(inputs) else None for skip in reversed(line.skips)]
    if line.student.middle is not None:
        found["middle"] = own.get("middle", [])
    return found


def _mixed(control: Any) -> Any:
    control.__class__ = _adapted_class(control.__class__)
    control.line = None
    return control


@cache
def _adapted_class(base: Any) -> type:
    return type(f"Koala{base.__name__}", (_Adapted, base), {"__module__": __name__})


def _require_carried(before: Residuals, line: Lineage) -> None:
    if max(len(before["output"]), len(before["input"])) > len(line.skips):
        raise ValueError(
            f"a ControlNet in this chain gives SDXL's residuals to {name(line.student)}; expected every ControlNet to "
            f"pass through KOALA ControlNet. Put KOALA ControlNet behind each ControlNet loader."
        )


def _require_sdxl(control: Any) -> None:
    if isinstance(control, ControlLora):
        raise ValueError(
            "this ControlNet is a Control-LoRA, which is built on the weights of SDXL's whole U-Net; KOALA has only a "
            "part of them. Choose the whole ControlNet of the same kind."
        )
    if isinstance(control, T2IAdapter):
        if not getattr(control.t2i_model, "xl", False):
            raise ValueError(
                "this T2I-Adapter was made for another model, Stable Diffusion 1.x most likely; expected one for SDXL. "
                "Choose an SDXL T2I-Adapter."
            )
        return
    blocks = getattr(getattr(control, "control_model", None), "zero_convs", None)
    if not isinstance(control, ControlNet) or blocks is None:
        raise ValueError(
            f"this ControlNet was made for another family of models ({type(control).__name__}); expected one for "
            f"SDXL. Choose an SDXL ControlNet or T2I-Adapter."
        )
    if len(blocks) > SKIPS:
        raise ValueError(
            f"this ControlNet has {len(blocks)} residuals, so it was made for Stable Diffusion 1.x or 2.x; expected an "
            f"SDXL ControlNet with {SKIPS}. Choose the SDXL version."
        )
