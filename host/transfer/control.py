"""SDXL's ControlNets and T2I-Adapters on a KOALA: each residual goes to the skip connection it belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import comfy.controlnet
import torch
from comfy.controlnet import ControlBase, ControlLora, T2IAdapter

from ...koala.architecture.layout import SDXL, name
from ...koala.architecture.lineage import Lineage
from ..model import model_facts, sampled_lineage
from ..protocols import BaseModel, ControlNet, Executor, Model, Residuals
from .references import reachable

SKIPS = tuple(range(sum(map(len, SDXL.up))))
"""SDXL's skip connections; a ControlNet has a residual for each of the nine."""
SD1_SKIPS = 12
"""As many has Stable Diffusion 1.x or 2.x."""
PUT_NODE = "Put KOALA ControlNet behind each ControlNet loader."


class _Adapter:
    """In front of one ControlNet's methods: looks at the model that is sampled, and moves residuals to its layers.

    It sits on the ControlNet itself, before what other packs set there and before any class's, and delegates to them.
    The ControlNet keeps its class, by which other packs convert it, and their conversions are adapted as copies are.
    Where the U-Net takes SDXL's residuals, as SDXL itself does, nothing is changed: one ControlNet serves both.
    """

    METHODS = ("pre_run", "get_control", "copy", "copy_to")

    def __init__(self, control: ControlNet) -> None:
        self._control = weakref.ref(control)  # which holds this adapter
        self._behind = {method: vars(control)[method] for method in self.METHODS if method in vars(control)}
        self.lineage: Lineage | None = None
        """Of the model that is sampled; None where its U-Net takes SDXL's residuals."""
        vars(control).update(pre_run=self.pre_run, get_control=self.get_control, copy=self.copy, copy_to=self.copy_to)

    @property
    def control(self) -> ControlNet:
        control = self._control()
        assert control is not None  # whoever calls holds it
        return control

    def _own(self, method: str) -> Callable[..., Any]:
        """The ControlNet's own method, as another pack set it or as its class has it."""
        own = getattr(type(self.control), method).__get__(self.control)
        found: Callable[..., Any] = self._behind.get(method, own)
        return found

    def pre_run(self, model: BaseModel, percent_to_timestep_function: Callable[[float], float]) -> None:
        lineage = sampled_lineage(model)
        self.lineage = lineage if lineage is not None and takes_other_residuals(lineage) else None
        self._own("pre_run")(model, percent_to_timestep_function)

    def get_control(self, *arguments: Any, **further: Any) -> Residuals | None:
        """This ControlNet's residuals and those of the ones before it, a list for each of input, middle and output."""
        control = self.control
        previous = control.previous_controlnet
        before = previous.get_control(*arguments, **further) if previous is not None else None
        control.previous_controlnet = None  # so that its own code gives this one's residuals alone
        try:
            own: Residuals | None = self._own("get_control")(*arguments, **further)
        finally:
            control.previous_controlnet = previous
        if own is not None and self.lineage is not None:
            own = remapped(own, self.lineage)
        if before is None:
            return own
        if self.lineage is not None:
            _require_remapped(before, self.lineage)
        return before if own is None else _merged(own, before)

    def copy(self) -> ControlNet:
        return _adapted(self._own("copy")())

    def copy_to(self, other: ControlNet) -> None:
        """What copies and conversions are made with: they are adapted, too."""
        self._own("copy_to")(other)
        _adapted(other)


def adapt(control: ControlNet) -> ControlNet:
    """A copy of a ControlNet whose residuals fit the KOALA that is sampled with it.

    Raises ValueError for one that was not made for SDXL, or that needs SDXL's own weights.
    """
    if _adapter(control) is not None:
        return control
    _require_sdxl(control)
    return _adapted(control.copy())


def chain(control: ControlNet | None) -> Iterator[ControlNet]:
    """A ControlNet and those that it follows."""
    while control is not None:
        yield control
        control = control.previous_controlnet


def fits(control: ControlNet, lineage: Lineage) -> bool | None:
    """Whether the U-Net that is sampled has the layers that a ControlNet's own residuals are for; None where only the
    residuals themselves can tell."""
    if not takes_other_residuals(lineage) or _adapter(control) is not None:
        return True
    override = vars(control).get("get_control")
    if any(type(held) is _Adapter and held.control is control for held in reachable(override)):
        return True  # another pack's function calls ours
    count = _residual_count(control)
    return None if count is None else count <= len(lineage.skips)


def watch(model: Model, controls: Iterable[ControlNet]) -> Callable[..., torch.Tensor]:
    """A wrapper around a KOALA's U-Net that looks at the residuals as the U-Net gets them.

    It raises ValueError where there are more of them than the U-Net has skip connections.
    ``controls``: those of which nothing else is known, for the message.
    """
    lineage, named = model_facts(model).lineage, ", ".join(sorted({type(control).__name__ for control in controls}))

    def look(
        executor: Executor,
        x: Any,
        timesteps: Any,
        context: Any,
        y: Any,
        control: Residuals | None,
        *rest: Any,
        **more: Any,
    ) -> torch.Tensor:
        count = max(len((control or {}).get(key, ())) for key in ("input", "output"))
        if count > len(lineage.skips):
            raise ValueError(
                f"a ControlNet ({named}) gives {count} residuals, and {name(lineage.student)} has "
                f"{len(lineage.skips)} skip connections; expected as many at most. {PUT_NODE}"
            )
        return executor(x, timesteps, context, y, control, *rest, **more)

    return look


def takes_other_residuals(lineage: Lineage) -> bool:
    """Whether a U-Net lacks some of the layers that SDXL's residuals are for."""
    return lineage.skips != SKIPS or lineage.student.middle is None


def remapped(own: Mapping[str, list[Any]], lineage: Lineage) -> Residuals:
    """SDXL's residuals as KOALA's U-Net takes them from each list's end.

    ``output`` (ControlNets) holds one for each skip connection, from the first block on; ``input`` (T2I-Adapters) holds
    them from the last block on. A list that is as long as KOALA's own is left as it is: a ControlNet made for KOALA.

    Raises ValueError where ``output`` has another length than those two.
    """
    residuals: Residuals = {"input": [], "middle": [], "output": []}
    output, inputs = own.get("output", []), own.get("input", [])
    if output and len(output) not in (len(SKIPS), len(lineage.skips)):
        raise ValueError(
            f"this ControlNet has {len(output)} residuals; expected SDXL's {len(SKIPS)}, or the {len(lineage.skips)} "
            f"of {name(lineage.student)}. It was made for another U-Net: choose an SDXL ControlNet."
        )
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


def _adapter(control: ControlNet) -> _Adapter | None:
    adapter = getattr(vars(control).get("get_control"), "__self__", None)
    return adapter if type(adapter) is _Adapter else None


def _adapted(control: ControlNet) -> ControlNet:
    """The same ControlNet, with an adapter in front of its methods."""
    if _adapter(control) is None:
        _Adapter(control)
    return control


def _residual_count(control: Any) -> int | None:
    """How many residuals for skip connections a ControlNet gives; None where its own parts do not tell."""
    convolutions = getattr(getattr(control, "control_model", None), "zero_convs", None)
    if convolutions is not None:
        return len(convolutions)
    if hasattr(control, "t2i_model"):
        return len(SKIPS) if getattr(control.t2i_model, "xl", False) else SD1_SKIPS
    stored = getattr(control, "control_weights", None) or {}  # a Control-LoRA has no network before it is sampled
    return len({key.split(".")[1] for key in stored if key.startswith("zero_convs.")}) or None


def _require_remapped(before: Residuals, lineage: Lineage) -> None:
    if max(len(before["output"]), len(before["input"])) > len(lineage.skips):
        raise ValueError(
            f"a ControlNet in this chain has SDXL's residuals, and {name(lineage.student)} has other layers; expected "
            f"every ControlNet to pass through KOALA ControlNet. {PUT_NODE}"
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
