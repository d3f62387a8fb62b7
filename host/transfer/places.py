"""SDXL's numbers in what other nodes' functions keep: blocks that they work on, and weights for each transformer.

A function of another pack cannot be asked which layers it is for. Its closure and its attributes show it: a block's
name and number, the names of SDXL's modules, or a weight for each of SDXL's eleven attention modules.
"""

from __future__ import annotations

import functools
import re
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ...koala.architecture.lineage import Lineage

Place = tuple[Any, ...]
"""Where attention is: (block name, number) or (block name, number, transformer block)."""

MOST_VALUES = 20_000
"""Values that are looked at in one function."""

_PARTS = ("input", "middle", "output")
_MODULE = re.compile(r"(?:(input|output)_blocks?[._](\d+)|(middle)_block)[._]1[._]transformer_blocks[._](\d+)")
_CONTAINERS = (list, tuple, set, frozenset, deque)
_OPAQUE = ("torch", "comfy", "numpy", "builtins", "weakref")
"""Packages whose objects hold no other node's settings."""


class Places(NamedTuple):
    """Places that a function works on: those that a KOALA has too, and those that it lacks."""

    own: tuple[Place, ...]
    stray: tuple[Place, ...]


def own_places(lineage: Lineage) -> set[Place]:
    """A model's places of attention by its own numbers, whole blocks and their transformer blocks."""
    return {*lineage.depths, *((*block, index) for block, depth in lineage.depths.items() for index in range(depth))}


def places_of(function: object, lineage: Lineage) -> Places:
    """The places in what a function keeps, each once."""
    own, found = own_places(lineage), dict.fromkeys(_places(function))
    return Places(tuple(place for place in found if place in own), tuple(place for place in found if place not in own))


def transformer_weights(function: object, count: int) -> dict[int, float] | None:
    """A function's weight for each of some of a U-Net's ``count`` attention modules, zeros left out; None where it has
    none such, or another weight as well, which counts everywhere."""
    named = (held for _, names in _values(function) for name, held in names.items() if "weight" in name.lower())
    each = [weight for held in named for weight in (held if isinstance(held, list) else [held])]
    weights = [weight for weight in each if isinstance(weight, int | float | dict | torch.Tensor)]
    by_transformer = [weight for weight in weights if isinstance(weight, dict) and weight.keys() <= {*range(count)}]
    if not weights or len(by_transformer) < len(weights):
        return None
    return {index: weight for part in by_transformer for index, weight in part.items() if weight}


def share_state(function: object, others: Iterable[object]) -> bool:
    """Whether a function shares variables, or the object it is bound to, with one of others: one node made them."""
    state = _state(function)
    return any(state & _state(other) for other in others)


def _places(function: object) -> Iterator[Place]:
    for value, names in _values(function):
        if type(value) is tuple and len(value) in (2, 3) and value[0] in _PARTS and type(value[1]) is int:
            index = value[2] if len(value) == 3 else None
            if index is None or type(index) is int:
                yield value[:2] if index is None else value
        elif type(value) is str and (module := _MODULE.search(value)):
            yield (module[3], 0, int(module[4])) if module[3] else (module[1], int(module[2]), int(module[4]))
        for name, part in names.items():
            if type(part) is str and part in _PARTS:
                numbers = [each for other, each in names.items() if other.startswith(name) and type(each) is int]
                if len(numbers) == 1:
                    yield part, numbers[0]


def _values(function: object) -> Iterator[tuple[object, Mapping[str, Any]]]:
    """What a function keeps, itself first, each with the named values in it."""
    seen, left = {id(function): function}, deque([function])
    while left and len(seen) < MOST_VALUES:
        value = left.popleft()
        names = _names(value)
        yield value, names
        for inner in (*names.values(), *_inner(value)):
            if id(inner) not in seen:
                seen[id(inner)] = inner
                left.append(inner)


def _names(value: object) -> Mapping[str, Any]:
    kind = type(value)
    if issubclass(kind, types.FunctionType):
        function: Any = value
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        return {
            **{name: cell.cell_contents for name, cell in cells if _is_set(cell)},
            **(function.__kwdefaults__ or {}),
            **vars(function),
        }
    if issubclass(kind, functools.partial):
        return dict(value.keywords)  # type: ignore[attr-defined]
    if issubclass(kind, dict):
        return {key: held for key, held in value.items() if type(key) is str}  # type: ignore[attr-defined]
    if issubclass(kind, type | torch.nn.Module) or kind.__module__.partition(".")[0] in _OPAQUE:
        return {}
    slots = (name for base in kind.__mro__ for name in getattr(base, "__slots__", ()))
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _inner(value: object) -> Iterable[object]:
    """What else is in it."""
    kind, held = type(value), value
    if issubclass(kind, types.FunctionType):
        return getattr(held, "__defaults__", None) or ()
    if issubclass(kind, types.MethodType):
        return (held.__func__, held.__self__)  # type: ignore[attr-defined]
    if issubclass(kind, functools.partial):
        return (held.func, *held.args)  # type: ignore[attr-defined]
    if issubclass(kind, dict):
        return (*held, *(each for key, each in held.items() if type(key) is not str))  # type: ignore
    return held if issubclass(kind, _CONTAINERS) else ()  # type: ignore[return-value]


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # an empty cell has no other sign
    except ValueError:
        return False
    return True


def _state(function: object) -> set[int]:
    """Identities of a function's variables from outside, and of the object that it is bound to."""
    inner: Callable[..., Any] | object = getattr(function, "__func__", function)
    bound = {id(function.__self__)} if isinstance(function, types.MethodType) else set()
    return bound | {id(cell) for cell in getattr(inner, "__closure__", None) or ()}
