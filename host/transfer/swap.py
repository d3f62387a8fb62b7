"""An SDXL MODEL's patches on a KOALA U-Net: what KOALA U-Net Swap puts in SDXL's place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import comfy.utils

from ...koala.architecture.keys import parameters
from ...koala.architecture.layout import name
from ...koala.architecture.lineage import Lineage
from ...koala.words import Message, joined, message
from ..model import described, model_facts, unet_layout
from ..protocols import Model
from . import attention
from .compatibility import incompatible_patches
from .guard import with_guard
from .references import UNetSearch, made_by, replaced_forwards

COMPILED = "torch.compile"
"""Key of core's wrapper that runs a compiled U-Net: SDXL's, so it cannot stay."""

CALLBACK, WRAPPER = message("callback"), message("wrapper")
_UNET = "diffusion_model"
_Name = TypeVar("_Name")
_Functions = dict[str, dict[Any, list[Any]]]
"""Wrappers or callbacks as ComfyUI keeps them: where they are called -> key of the node that set them -> functions."""


class Swapped(NamedTuple):
    """A KOALA MODEL with an SDXL MODEL's patches, and a text that says what was carried over and what was not."""

    model: Model
    report: Message


def swap(sdxl: Model, koala: Model) -> Swapped:
    """A clone of ``koala`` with everything that was set on the MODEL ``sdxl``; neither of the two is changed.

    Carried over: weight patches of LoRAs (to the layers they belong to), model_sampling and other object patches, all
    of model_options (functions around cfg, attention and block patches by their blocks), wrappers, callbacks,
    additional models, attachments; but nothing that holds SDXL's U-Net. The report names what was dropped.

    Raises ValueError where ``sdxl`` is not SDXL or not as wide as ``koala``, or has patches by transformer blocks and
    nothing says which of those ``koala`` kept.
    """
    lineage = _lineage(sdxl, koala)
    own = name(lineage.student)
    lines: list[str] = [
        message(
            "{model} replaces SDXL: a U-Net of {parameters} parameters instead of {sdxl}",
            model=own,
            parameters=f"{parameters(lineage.student):,}",
            sdxl=f"{parameters(lineage.teacher):,}",
        )
    ]
    new, sieve = koala.clone(), _Sieve(UNetSearch(sdxl.model))
    lines += _carry_weight_patches(sdxl, new, lineage, sieve)

    new.model_options = _free_options(comfy.utils.deepcopy_list_dict(sdxl.model_options), sieve)
    lines += _remap(new.model_options, lineage)

    outside = {key: patch for key, patch in sdxl.object_patches.items() if not key.startswith(_UNET)}
    new.object_patches |= sieve.of_mapping(message("object patch"), outside)
    inside = [key for key in sdxl.object_patches if key.startswith(_UNET)]
    if inside:
        lines.append(message("dropped: patched modules of SDXL's U-Net, first: {module}", module=inside[0]))

    compiled = any(COMPILED in by_key for by_key in sdxl.wrappers.values())
    functions = (CALLBACK, sdxl.callbacks), (WRAPPER, sdxl.wrappers)
    new.callbacks, wrappers = _free_functions(*functions, sieve=sieve)
    new.wrappers = with_guard(wrappers)
    if compiled:
        new.model_options.pop("torch_compile_kwargs", None)
        lines.append(message("dropped: torch.compile, which ran SDXL's U-Net; put TorchCompileModel behind the swap"))
    new.additional_models = {
        key: [model.clone() for model in sieve.of_list(_named(message("additional model"), key), models)]
        for key, models in sdxl.additional_models.items()
    }
    new.attachments = {**sieve.of_mapping(message("attachment"), sdxl.attachments), **koala.attachments}
    injections = message("injections (motion modules, for example)")
    for kind, set_on in ((injections, sdxl.injections), (message("hooks"), sdxl.forced_hooks)):
        if set_on:
            lines.append(message("dropped: {what}, which change SDXL's own layers", what=kind))
    return Swapped(new, joined("\n", (*lines, *_replaced(sdxl), *sieve.lines(), *incompatible_patches(new))))


class _Sieve:
    """Keeps back what holds SDXL's U-Net, and counts it by what it was, which node made it, and why."""

    def __init__(self, search: UNetSearch) -> None:
        self._search = search
        self._dropped: Counter[tuple[str, str, str]] = Counter()

    def passes(self, what: str, held: object, *names: object) -> bool:
        """Whether something that was set on SDXL, and the names that it was set under, are free of its U-Net."""
        free = not any(map(self._search.holds, (held, *names)))
        if not free:
            self.drop(what, held, message("SDXL's U-Net is in it"))
        return free

    def drop(self, what: str, held: object, why: str) -> None:
        self._dropped[what, made_by(held), why] += 1

    def of_list(self, what: str, listed: Iterable[Any]) -> list[Any]:
        return [held for held in listed if self.passes(what, held)]

    def of_mapping(self, what: str, mapping: Mapping[_Name, Any], named: bool = True) -> dict[_Name, Any]:
        """``named``: whether the report gives each entry's name."""
        return {
            key: held
            for key, held in mapping.items()
            if self.passes(_named(what, key) if named and isinstance(key, str) else what, held, key)
        }

    def lines(self) -> list[str]:
        return [
            message(
                "dropped: {what}: {reason}; put that node behind the swap",
                what=message("{what} of {node}", what=_counted(count, what), node=node)
                if node
                else _counted(count, what),
                reason=why,
            )
            for (what, node, why), count in self._dropped.items()
        ]


def _counted(count: int, what: str) -> str:
    return what if count == 1 else message("{count} {what}s", count=count, what=what)


def _named(what: str, name: str) -> str:
    return message("{what} {name}", what=what, name=name)


def _free_options(options: dict[str, Any], sieve: _Sieve) -> dict[str, Any]:
    """A MODEL's options (a copy of them) without what holds SDXL's U-Net."""
    transformer = options["transformer_options"]
    free: dict[str, Any] = {}
    for key, held in options.items():
        if isinstance(held, list):  # functions around cfg, each from another node
            free[key] = sieve.of_list(key, held)
        elif key != "transformer_options" and sieve.passes(key, held, key):
            free[key] = held
    patches = {kind: sieve.of_list(kind, listed) for kind, listed in transformer.get("patches", {}).items()}
    replacements = {
        kind: sieve.of_mapping(message("{kind} replacement", kind=kind), by_place, named=False)
        for kind, by_place in transformer.get(attention.ATTENTION_REPLACEMENTS, {}).items()
    }
    functions = [(kind, transformer.get(f"{kind}s", {})) for kind in (CALLBACK, WRAPPER)]
    callbacks, wrappers = _free_functions(*functions, sieve=sieve)
    known = {
        "patches": patches,
        attention.ATTENTION_REPLACEMENTS: replacements,
        "callbacks": callbacks,
        "wrappers": wrappers,
    }
    others = {key: held for key, held in transformer.items() if key not in known}
    kept = {key: held for key, held in known.items() if key in transformer}
    free["transformer_options"] = kept | sieve.of_mapping(message("transformer option"), others)
    return free


def _free_functions(*kinds: tuple[str, Mapping[str, Mapping[Any, Iterable[Any]]]], sieve: _Sieve) -> list[_Functions]:
    """Callbacks and wrappers without those that hold SDXL's U-Net, nor the others that the same node set (the same
    key), which count on them. ``kinds``: what they are, and the functions."""
    free: list[_Functions] = []
    unfit: set[Any] = set()
    for kind, functions in kinds:
        free.append({})
        for place, by_key in functions.items():
            what = message("{place} {kind}", place=place, kind=kind)
            passed = {key: sieve.of_list(what, held) for key, held in by_key.items() if key != COMPILED}
            unfit |= {key for key in passed if key is not None and len(passed[key]) < len(list(by_key[key]))}
            free[-1][place] = passed
    for (kind, _), own in zip(kinds, free, strict=True):
        for place, by_key in own.items():
            what = message("{place} {kind}", place=place, kind=kind)
            for key in unfit & by_key.keys():
                for held in by_key.pop(key):
                    sieve.drop(what, held, message("it belongs to another of the same node ({key})", key=key))
    return free


def _remap(options: dict[str, Any], lineage: Lineage) -> list[str]:
    """Remap the attention and block patches in a MODEL's options, in place; returns lines for the report."""
    own = name(lineage.student)
    lines: list[str] = []
    remapping = attention.remap(options["transformer_options"], lineage)
    if remapping.remapped:
        lines.append(
            message(
                "attention and block patches: {count} remapped to {model}'s blocks", count=remapping.remapped, model=own
            )
        )
    if remapping.dropped:
        stray = attention.places(place for place, _ in remapping.dropped)
        lines.append(
            message("dropped: attention patches on blocks that {model} lacks ({places})", model=own, places=stray)
        )
    return lines + attention.drop_companions(options, remapping)


def _replaced(sdxl: Model) -> list[str]:
    """A line for the forward functions that a node replaced on SDXL's modules themselves."""
    prefix, suffix = f"{_UNET}.", ".forward"
    patched = {key.removeprefix(prefix).removesuffix(suffix) for key in sdxl.object_patches if key.endswith(suffix)}
    replaced = replaced_forwards(sdxl.model.diffusion_model)
    found = {name: held for name, held in replaced.items() if name not in patched}
    if not found:
        return []
    first, origin = next((name, made_by(held)) for name, held in found.items())
    first = message("{module}, by {node}", module=first, node=origin) if origin else first
    if len(found) == 1:
        return [
            message(
                "dropped: the forward of 1 module of SDXL's U-Net, which a node replaced (first: {first}); put that "
                "node behind the swap",
                first=first,
            )
        ]
    return [
        message(
            "dropped: the forward of {count} modules of SDXL's U-Net, which a node replaced (first: {first}); put that "
            "node behind the swap",
            count=len(found),
            first=first,
        )
    ]


def _lineage(sdxl: Model, koala: Model) -> Lineage:
    lineage = model_facts(koala).lineage
    layout = unet_layout(sdxl)
    if layout == lineage.teacher:
        return lineage
    raise ValueError(
        f"the MODEL is {described(sdxl)}; expected SDXL, with text of width {lineage.teacher.context} and "
        f"{lineage.teacher.channels[0]} channels, so that {name(lineage.student)} can take its place. "
        f"Connect the MODEL of an SDXL checkpoint."
    )


def _carry_weight_patches(sdxl: Model, new: Model, lineage: Lineage, sieve: _Sieve) -> list[str]:
    """Give ``new`` the weight patches of ``sdxl``, under its own names; returns lines for the report."""
    patched = bool(sdxl.patches or sdxl.weight_wrapper_patches)
    names = lineage.names("comfy") if patched else {}  # a plain SDXL can be swapped without knowing what was kept
    names = {f"{_UNET}.{there}": f"{_UNET}.{here}" for there, here in names.items()}
    own = name(lineage.student)
    new.patches, counts = _weight_patches(sdxl.patches, names, sieve)
    new.patches_uuid = uuid4()
    new.weight_wrapper_patches = {
        names[key]: sieve.of_list(message("weight wrapper"), wrappers)
        for key, wrappers in sdxl.weight_wrapper_patches.items()
        if key in names
    }
    new.force_cast_weights = sdxl.force_cast_weights
    lines: list[str] = []
    if counts.carried or counts.dropped:
        lines.append(
            message(
                "weight patches: {count} carried over, {lost} are for layers that {model} lacks",
                count=counts.carried,
                lost=counts.dropped,
                model=own,
            )
        )
    if counts.merges:
        lines.append(
            message(
                "dropped: {count} merged weights, which mix SDXL's own; merge KOALA models instead", count=counts.merges
            )
        )
    return lines


class _Counts(NamedTuple):
    """Weight patches that were carried over, that have no layer, and that merge another model's weights."""

    carried: int
    dropped: int
    merges: int


def _weight_patches(
    patches: Mapping[str, list[Any]], names: Mapping[str, str], sieve: _Sieve
) -> tuple[dict[str, list[Any]], _Counts]:
    """The patches under KOALA's names, and what became of how many."""
    carried: dict[str, list[Any]] = {}
    dropped = merges = 0
    for key, listed in patches.items():
        changes = [patch for patch in listed if _is_change(patch)]
        merges += len(listed) - len(changes)
        if key not in names:
            dropped += len(changes)
        elif changes := sieve.of_list(message("weight change"), changes):
            carried[names[key]] = changes
    return carried, _Counts(sum(map(len, carried.values())), dropped, merges)


def _is_change(patch: tuple[Any, ...]) -> bool:
    """True for a patch that adds to a weight, as LoRAs do, or scales it; False for one that mixes in or sets another
    model's."""
    value = patch[1]
    return not (isinstance(value, list) or (isinstance(value, tuple) and value[0] in ("set", "model_as_lora")))
