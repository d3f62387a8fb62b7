"""Where a MODEL's patches and ControlNets change with the noise level: what they hold, read as data.

An IP-Adapter with a start and an end acts in one part of the noise schedule only. It is a function that compares the
step's sigma with numbers that it holds, and it is called deep in the U-Net, where an extrapolated step does not come.
So these numbers are looked for before a run: features from before and after such a level are not comparable. Patches
that read the noise level and hold no such number change in a way that cannot be read: then every step is a full step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .plan import Gates

READS = "sigma"
"""In the code of a function that reads the noise level."""
NAMES = re.compile("sigma|percent|(?:^|_)(?:start|end|begin|stop|from|until)(?:_|$)")
"""Names of numbers that may be levels."""
MOST_OBJECTS = 5000
"""A patch that holds more is not searched to its end, so that its levels are not known."""

OUR_KEYS = "koala_"
"""Wrappers of this pack, which are the same at every noise level, have keys that begin with this."""
COMPILED_BY_CORE = "torch.compile"
"""Key of the wrapper by which core's TorchCompileModel, and other nodes, have a U-Net compiled; it changes nothing."""


def gates(options: Mapping[str, Any], conds: Mapping[str, Any], percent_to_sigma: Callable[[float], float]) -> Gates:
    """The gates of a MODEL's patches and wrappers, from its transformer options, and of the ControlNets in its
    conditioning. ``percent_to_sigma``: the noise level at a part of the schedule."""
    levels: set[float] = set()
    unknown = ""
    patches = {id(patch): patch for patch in _patches(options)}.values()  # one stands in many places
    for patch in patches:
        held = list(_inside(patch))
        searched = len(held) < MOST_OBJECTS
        if searched and not any(isinstance(value, CodeType) and READS in _words(value) for _, value in held):
            continue
        found = set(_levels(held, percent_to_sigma))
        if not (found and searched):
            unknown = f"a patch on the MODEL ({_name(patch)}) changes with the noise level; where is not known"
        levels |= found
    for control in (cond["control"] for side in conds.values() for cond in side if "control" in cond):
        levels |= set(_levels(_inside(control), percent_to_sigma))
    return Gates(frozenset(levels), unknown, patched=bool(patches))


def is_compiled_by_core(options: Mapping[str, Any]) -> bool:
    """Whether a node has the U-Net compiled, from a MODEL's transformer options."""
    return COMPILED_BY_CORE in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})


def _patches(options: Mapping[str, Any]) -> Iterator[object]:
    for patches in options.get("patches", {}).values():
        yield from patches
    for replacements in options.get("patches_replace", {}).values():
        yield from replacements.values()
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):
        for key, wrappers in options.get("wrappers", {}).get(kind, {}).items():
            if not str(key).startswith(OUR_KEYS) and key != COMPILED_BY_CORE:
                yield from wrappers


def _levels(held: Iterable[tuple[str, object]], percent_to_sigma: Callable[[float], float]) -> Iterator[float]:
    """The numbers that may be levels. One without a unit in its name may be a part of the schedule or a sigma."""
    for name, value in held:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, int | float) or isinstance(value, bool) or not NAMES.search(name):
            continue
        if "percent" not in name:
            yield float(value)
        if "sigma" not in name and 0 <= value <= 1:
            yield float(percent_to_sigma(float(value)))


def _inside(root: object) -> Iterator[tuple[str, object]]:
    """Everything that an object can reach, with the names it is held by; code too. Models are not entered."""
    queue: list[tuple[str, object]] = [("", root)]
    seen: set[int] = set()
    count = 0
    while queue and count < MOST_OBJECTS:
        name, value = queue.pop()
        count += 1
        yield name, value
        if id(value) not in seen:
            seen.add(id(value))
            queue.extend(_members(name, value))


def _members(name: str, value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, str | bytes | int | float | type | torch.Tensor | torch.nn.Module | ModelPatcher | CodeType):
        return ()
    if isinstance(value, Mapping):
        return [(str(key), member) for key, member in value.items()]
    if isinstance(value, Sequence | set | frozenset):
        return [(name, member) for member in value]
    if isinstance(value, MethodType):
        return [(name, value.__func__), (name, value.__self__)]
    if isinstance(value, partial):
        return [(name, value.func), (name, value.args), *value.keywords.items()]
    if isinstance(value, FunctionType):
        return _of_function(value)
    called = vars(type(value)).get("__call__")
    return [("", called), *getattr(value, "__dict__", {}).items()]


def _of_function(function: FunctionType) -> list[tuple[str, object]]:
    """A function's code, closure, defaults, and the functions of its own module that it calls."""
    code = function.__code__
    held: list[tuple[str, object]] = [("", code), *(function.__kwdefaults__ or {}).items()]
    defaults = function.__defaults__ or ()
    held += zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            held.append((name, cell.cell_contents))
        except ValueError:  # a name that is not bound yet
            continue
    called = (function.__globals__.get(name) for name in code.co_names)
    held += [("", one) for one in called if isinstance(one, FunctionType) and one.__module__ == function.__module__]
    return held


def _words(code: CodeType) -> str:
    """The names and texts in a function's code, functions within it included."""
    inner = (_words(part) if isinstance(part, CodeType) else part for part in code.co_consts)
    return " ".join([*code.co_names, *code.co_varnames, *code.co_freevars, *(w for w in inner if isinstance(w, str))])


def _name(patch: object) -> str:
    return str(getattr(patch, "__qualname__", type(patch).__qualname__))
