"""Which functions and objects hold a U-Net: what other nodes leave on a MODEL, searched for its modules and weights."""

from __future__ import annotations

import bisect
import functools
import gc
import re
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from ..protocols import BaseModel

MOST_OBJECTS = 200_000
"""Objects that are looked at for one patch; one that leads to more is not shown to be free of the U-Net."""

Sample = tuple[torch.Size, tuple[float, ...]]
"""Of a weight: its shape and some of its values."""

_OPAQUE = (types.ModuleType, types.CodeType, types.FrameType)
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "comfy"}
"""Packages whose classes hold registries of everything that is loaded, and nothing of one node's."""
_VALUES = 8


class UNetSearch:
    """Finds out whether an object leads to one model's U-Net.

    It does where the model, a module of its U-Net, or a tensor in the memory of one of its weights can be reached from
    it: by closures, defaults, bound ``self``, attributes, classes, containers (keys, too) and weak references, but not
    by the global variables of a function. A copy of one of its modules counts as that module.
    """

    def __init__(self, model: BaseModel) -> None:
        network = model.diffusion_model
        modules = [*network.modules()]
        self._network = network
        self._types = {*map(type, modules)}
        # weak references, too: a proxy does not say what it stands for
        owned = [model, *modules]
        self._own = {*map(id, owned), *(id(reference) for each in owned for reference in weakref.getweakrefs(each))}
        ranges = sorted(filter(None, map(_memory, (*network.parameters(), *network.buffers()))))
        self._starts, self._ends = [start for start, _ in ranges], [end for _, end in ranges]
        self._free: dict[int, object] = {}
        """What earlier searches have shown to be free, kept so that no other object gets its id."""

    def holds(self, held: object) -> bool:
        """Whether the U-Net can be reached from an object, or cannot be shown not to be."""
        seen, left = {id(held): held}, [held]
        while left:
            each = left.pop()
            if self._is_part(each) or len(seen) > MOST_OBJECTS:
                return True
            for further in _referents(each):
                key = id(further)
                if key not in seen and key not in self._free and (gc.is_tracked(further) or key in self._own):
                    seen[key] = further
                    left.append(further)
        self._free |= seen
        return False

    def _is_part(self, each: object) -> bool:
        if id(each) in self._own:
            return True
        kind = type(each)
        if issubclass(kind, torch.Tensor):
            return self._in_memory(each)  # type: ignore[arg-type]
        return kind in self._types and self._is_copy(each)  # type: ignore[arg-type]

    def _in_memory(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of a weight."""
        memory = _memory(tensor)
        place = bisect.bisect_right(self._starts, memory[0]) - 1 if memory else -1
        return memory is not None and place >= 0 and memory[0] < self._ends[place]

    def _is_copy(self, module: torch.nn.Module) -> bool:
        samples = {*map(_sample, module.parameters())} - {None}
        return bool(samples) and samples <= self._samples

    @functools.cached_property
    def _samples(self) -> set[Sample | None]:
        return {*map(_sample, self._network.parameters())}


def reachable(held: object) -> Iterator[object]:
    """An object and what it leads to, of that the first ``MOST_OBJECTS``."""
    seen, left = {id(held): held}, [held]
    while left and len(seen) <= MOST_OBJECTS:
        each = left.pop()
        yield each
        for further in _referents(each):
            if id(further) not in seen and gc.is_tracked(further):
                seen[id(further)] = further
                left.append(further)


def replaced_forwards(network: torch.nn.Module) -> dict[str, object]:
    """Name of each module whose ``forward`` was replaced on the instance -> what it was replaced by."""
    return {name: vars(module)["forward"] for name, module in network.named_modules() if "forward" in vars(module)}


def made_by(held: object) -> str:
    """Where a function or object comes from, for a person: "DeepCache.apply in comfyui-deepcache".

    By its qualified name, and its custom node's folder or else its module; empty for plain data.
    """
    while isinstance(held, functools.partial):
        held = held.func
    named = held if hasattr(held, "__qualname__") else type(held)
    module, name = str(getattr(named, "__module__", "")), str(getattr(named, "__qualname__", ""))
    if module in ("", "None", "builtins"):
        return ""
    pack = re.search(r"custom_nodes[/\\.]([^/\\]+?)(?:\.[\w.]*)?$|custom_nodes[/\\]([^/\\]+)", module)
    folder = (pack[1] or pack[2]).replace("_x_", ".") if pack else re.split(r"[/\\]", module)[-1]  # core's own: a path
    *outer, inner = name.split(".<locals>.")
    methods = [each for each in outer if "." in each]  # a node's own method, in which it made the function
    return f"{(methods[-1:] or outer[:1] or [inner])[0]} in {folder}"


def _referents(held: object) -> Iterator[object]:
    """What an object refers to, weakly or strongly."""
    kind = type(held)
    if issubclass(kind, types.FunctionType):
        function: Any = held
        yield from (function.__closure__, function.__defaults__, function.__kwdefaults__, vars(function))
    elif issubclass(kind, type):
        if str(getattr(held, "__module__", "")).partition(".")[0] not in _FOREIGN | {"builtins"}:
            yield from (*vars(held).values(), *held.__bases__)  # type: ignore[attr-defined]
    elif not issubclass(kind, _OPAQUE):
        yield from gc.get_referents(held)
        if issubclass(kind, weakref.ReferenceType):
            yield held()  # type: ignore[operator]


def _memory(tensor: torch.Tensor) -> tuple[int, int] | None:
    """First address of a tensor's values and the one behind them; None for one without memory of its own."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return None
    start = tensor.data_ptr()
    return (start, start + tensor.nbytes) if start else None


def _sample(tensor: torch.Tensor) -> Sample | None:
    """A few values of a weight, by which a copy of it is known; None for one that has nothing of its own to show."""
    if _memory(tensor) is None:
        return None
    flat = tensor.detach().reshape(-1)
    values = tuple(flat[:: max(1, len(flat) // _VALUES)][:_VALUES].float().tolist())
    return (tensor.shape, values) if len(set(values)) > 1 else None
