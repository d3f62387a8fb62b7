"""Add-ons on a MODEL that do nothing on a KOALA, or the wrong thing, because they count SDXL's layers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage, lineage
from ..model import network_layout
from .attention import BLOCK_PATCHES, Rebound, places, unbound
from .control import is_adapted

BIND = "put KOALA Attention Patches behind the node that set it"


@dataclass(frozen=True)
class AddOn:
    """A stock node that does not do on a KOALA what it does on SDXL. ``node``: the class whose functions it leaves on a
    MODEL. ``wrong``: says for a layout and the function's own variables whether it is out of place there. ``reason``:
    why, and what to do."""

    node: str
    title: str
    wrong: Callable[[Layout, Mapping[str, Any]], bool]
    reason: str


_NO_MIDDLE = "it works on the middle block's attention, and {model} has no middle block: {effect}; remove it"

ADD_ONS = (
    AddOn(
        "SelfAttentionGuidance",
        "Self-Attention Guidance",
        lambda layout, _: layout.middle is None,
        _NO_MIDDLE.replace("{effect}", "sampling stops with an error"),
    ),
    AddOn(
        "PerturbedAttentionGuidance",
        "Perturbed-Attention Guidance",
        lambda layout, _: layout.middle is None,
        _NO_MIDDLE.replace("{effect}", "each step costs one pass more and nothing changes"),
    ),
    AddOn(
        "TomePatchModel",
        "Tome Patch Model",
        lambda layout, _: not any(layout.down[0]),
        "it merges tokens at full resolution only, where {model}, like SDXL, has no attention: nothing is merged; "
        "remove it",
    ),
    AddOn(
        "HyperTile",
        "HyperTile",
        lambda layout, variables: not any(layout.down[0]) and variables.get("max_depth") == 0,
        "max_depth 0 tiles full resolution only, where {model}, like SDXL, has no attention: nothing is tiled; set "
        "max_depth to 1 or remove it",
    ),
    AddOn(
        "PatchModelAddDownscale",
        "PatchModelAddDownscale (Kohya Deep Shrink)",
        lambda _, variables: "block_number" in variables,
        "its block number is SDXL's, and {model} has other numbers ({numbers}); " + BIND,
    ),
)


def misplaced(model: Any, layout: Layout) -> list[str]:
    """A line for each add-on on a KOALA MODEL that is out of place there: what it is, why, and what to do."""
    try:
        line = lineage(layout)
    except ValueError:
        return []  # a layout of one's own: nothing can be said of SDXL's numbers on it
    options = model.model_options["transformer_options"]
    found = []
    functions = list(_functions(model))
    for add_on in ADD_ONS:
        ours = [function for function in functions if _node(function) == add_on.node]
        if any(add_on.wrong(layout, inspect.getclosurevars(function).nonlocals) for function in ours):
            reason = add_on.reason.format(model=name(layout), numbers=_numbers(line, "input"))
            found.append(f"{add_on.title}: {reason}")
    if stray := unbound(options, line):
        found.append(
            f"{len(stray)} attention patches (an IP-Adapter's, or the like) are bound to blocks that {name(layout)} "
            f"lacks ({places(stray)}), as they have SDXL's numbers; {BIND}"
        )
    found.extend(_weights(model, line))
    return found


def require_carried(model: Any, *conditionings: Any) -> None:
    """Check, before a KOALA is sampled, that nothing would act on the wrong layers without a word.

    Raises ValueError for attention patches or ControlNets that still have SDXL's numbers.
    """
    layout = network_layout(getattr(model.model, "diffusion_model", None))
    try:
        line = lineage(layout) if layout is not None else None
    except ValueError:
        line = None
    if line is None:
        return
    stray = unbound(model.model_options["transformer_options"], line)
    if stray and all(key[0] == "middle" for key in stray):
        raise ValueError(
            f"this MODEL bears attention patches on the middle block, which {name(line.student)} lacks; expected none. "
            f"Remove the node that set them (Self-Attention Guidance or the like)."
        )
    if stray:
        raise ValueError(
            f"this MODEL bears {len(stray)} attention patches on blocks that {name(line.student)} lacks "
            f"({places(stray)}), so they have SDXL's numbers; expected KOALA's. Put KOALA Attention Patches behind the "
            f"node that set them (IP-Adapter or the like)."
        )
    for control in {
        part[1]["control"] for conditioning in conditionings for part in conditioning if "control" in part[1]
    }:
        if not is_adapted(control):
            raise ValueError(
                f"the conditioning brings a ControlNet that gives SDXL's residuals; {name(line.student)} has other "
                f"layers. Put KOALA ControlNet between the ControlNet's loader and Apply ControlNet."
            )


def _functions(model: Any) -> Iterator[Any]:
    """Every function that add-ons have left on a MODEL; those bound to KOALA's blocks are in their place."""
    options = model.model_options
    patches = options["transformer_options"].get("patches", {})
    candidates = [patch for kind in BLOCK_PATCHES for patch in patches.get(kind, ())]
    for held in options.values():
        candidates.extend(held if isinstance(held, list) else [held])
    for candidate in candidates:
        inner = candidate.patch if isinstance(candidate, Rebound) else candidate
        if inspect.isfunction(inner) and not (isinstance(candidate, Rebound) and _node(inner) == _SHRINK):
            yield inner


_SHRINK = "PatchModelAddDownscale"


def _node(function: Any) -> str:
    return function.__qualname__.partition(".")[0]


def _numbers(line: Lineage, part: str) -> str:
    """How KOALA's blocks of one part are numbered in SDXL, those that differ."""
    pairs = [(whole[1], own[1]) for own, whole in line.blocks.items() if own[0] == part and own != whole]
    return f"SDXL's {part} " + ", ".join(f"{whole} is its {own}" for whole, own in pairs)


def _weights(model: Any, line: Lineage) -> Iterator[str]:
    """Weight patches that cannot be meant for this KOALA."""
    shapes = {key: tuple(weight.shape) for key, weight in model.model.state_dict().items() if key in model.patches}
    unfit, ratios = [], set()
    for key, listed in model.patches.items():
        block = re.match(r"diffusion_model\.(input_blocks|output_blocks)\.\d+\.", key)
        for strength, value, strength_model, *_ in listed:
            pair: Any = getattr(value, "weights", None)
            if getattr(value, "name", "") == "lora" and pair[0].shape[0] * prod(pair[1].shape[1:]) != prod(shapes[key]):
                unfit.append(key)
            if isinstance(value, list) and block:
                ratios.add((strength, strength_model))
    if unfit:
        yield (
            f"a LoRA with {len(unfit)} modules of another shape than {name(line.student)}'s (first: {unfit[0]}): an "
            f"SDXL LoRA from the stock Load LoRA, which also reached wrong layers; load it with KOALA LoRA Loader"
        )
    if len(ratios) > 1:
        yield (
            f"a merge with a ratio for each block: the merge node's blocks are SDXL's, and {name(line.student)} has "
            f"other numbers ({_numbers(line, 'input')}; {_numbers(line, 'output')}); merge with one ratio"
        )
