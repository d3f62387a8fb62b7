"""Patches on a KOALA MODEL that have no effect or target the wrong layers, because they go by SDXL's numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage
from ...koala.words import Message, joined, message, template
from ..model import is_koala, model_facts
from ..protocols import ControlNet, Model
from .attention import ATTENTION_PATCHES, BLOCK_PATCHES, Remapped, idle_line, places, unmatched
from .control import chain, fits
from .places import places_of
from .references import made_by
from .weights import foreign_weights, require_own_hooks, require_own_weights

REMAP = message("put KOALA Attention Patches behind the node that set it")


@dataclass(frozen=True)
class IncompatibleNode:
    """A stock node that does not do on a KOALA what it does on SDXL.

    ``node``: the class whose functions it leaves on a MODEL. ``applies``: whether that is so for a layout and the
    function's own variables. ``reason``: why, and what to do; a template. ``remappable``: whether KOALA Attention
    Patches mends it.
    """

    node: str
    title: str
    applies: Callable[[Layout, Mapping[str, Any]], bool]
    reason: str
    remappable: bool = False


INCOMPATIBLE_NODES = (
    IncompatibleNode(
        "SelfAttentionGuidance",
        "Self-Attention Guidance",
        lambda layout, _: layout.middle is None,
        template(
            "it works on the middle block's attention, and {model} has no middle block: sampling stops with an error; "
            "remove it"
        ),
    ),
    IncompatibleNode(
        "PerturbedAttentionGuidance",
        "Perturbed-Attention Guidance",
        lambda layout, _: layout.middle is None,
        template(
            "it works on the middle block's attention, and {model} has no middle block: each step costs an extra pass "
            "and nothing changes; remove it"
        ),
    ),
    IncompatibleNode(
        "TomePatchModel",
        "Tome Patch Model",
        lambda layout, _: not any(layout.down[0]),
        template(
            "it merges tokens at full resolution only, where {model}, like SDXL, has no attention: nothing is merged; "
            "remove it"
        ),
    ),
    IncompatibleNode(
        "HyperTile",
        "HyperTile",
        lambda layout, variables: not any(layout.down[0]) and variables.get("max_depth") == 0,
        template(
            "max_depth 0 tiles full resolution only, where {model}, like SDXL, has no attention: nothing is tiled; set "
            "max_depth to 1 or remove it"
        ),
    ),
    IncompatibleNode(
        "PatchModelAddDownscale",
        "PatchModelAddDownscale (Kohya Deep Shrink)",
        lambda _, variables: "block_number" in variables,
        template("it uses SDXL's block number, and {model} numbers its blocks differently ({numbers}); {remedy}"),
        remappable=True,
    ),
)


def incompatible_patches(model: Model) -> list[str]:
    """A line for each patch on a KOALA MODEL that has no effect or targets the wrong layers: what, why, and what to do.

    Raises ValueError for a MODEL that is not a KOALA model.
    """
    lineage = model_facts(model).lineage
    layout, left_on = lineage.student, [*_functions(model.model_options)]
    lines: list[str] = []
    for known in INCOMPATIBLE_NODES:
        left = [
            each.function for each in left_on if each.node == known.node and not (each.remapped and known.remappable)
        ]
        if any(known.applies(layout, inspect.getclosurevars(function).nonlocals) for function in left):
            reason = message(known.reason, model=name(layout), numbers=_numbers(lineage, "input"), remedy=REMAP)
            lines.append(message("{node}: {reason}", node=known.title, reason=reason))
    if stray := unmatched(model.model_options["transformer_options"], lineage):
        lines.append(
            message(
                "{count} attention patches (from IP-Adapter or similar) are on blocks that {model} lacks ({places}), "
                "so they use SDXL's numbers; {remedy}",
                count=len(stray),
                model=name(layout),
                places=places(stray),
                remedy=REMAP,
            )
        )
    lines += [
        message("{node}: {fault}; {remedy}", node=each.origin, fault=each.fault, remedy=each.remedy)
        for each in _by_sdxls_numbers(left_on, lineage)
    ]
    lines += idle_line(model.model_options["transformer_options"], lineage)
    return [*lines, *foreign_weights(model), *_merge_by_block(model, lineage)]


def require_compatible(
    model: Model, options: Mapping[str, Any], conds: Iterable[Mapping[str, Any]]
) -> tuple[ControlNet, ...]:
    """Check, before a MODEL is sampled, that nothing would silently act on the wrong layers.

    Args:
        model: the MODEL.
        options: its options as it is sampled: ``model_options``, and what hooks add for the run.
        conds: the entries of all conditioning, each with what nodes have put beside the text.

    Returns the ControlNets of which only sampling shows whether they fit. Raises ValueError for attention patches and
    ControlNets that go by SDXL's numbers on a KOALA, and for other models' weights.
    """
    require_own_weights(model)
    if not is_koala(model):
        return ()
    conds = [*conds]
    require_own_hooks(model, conds)
    lineage = model_facts(model).lineage
    koala = name(lineage.student)
    stray = unmatched(options["transformer_options"], lineage)
    if stray and all(place[0] == "middle" for place in stray):
        raise ValueError(
            f"this MODEL has attention patches on the middle block, which {koala} lacks; expected none. Remove the "
            f"node that set them (Self-Attention Guidance or similar)."
        )
    if stray:
        raise ValueError(
            f"this MODEL has {len(stray)} attention patches on blocks that {koala} lacks ({places(stray)}), so they "
            f"use SDXL's numbers; expected KOALA's. Put KOALA Attention Patches behind the node that set them "
            f"(IP-Adapter or similar)."
        )
    for each in _by_sdxls_numbers(_functions(options), lineage):
        if each.wrong:
            remedy = each.remedy[0].upper() + each.remedy[1:]
            raise ValueError(f"this MODEL has a function ({each.origin}) that {each.fault}. {remedy}.")
    controls = {id(control): control for cond in conds for control in chain(cond.get("control"))}
    fitting = {key: fits(control, lineage) for key, control in controls.items()}
    if False in fitting.values():
        raise ValueError(
            f"the conditioning has a ControlNet with SDXL's residuals; {koala} has other layers. Put KOALA ControlNet "
            f"between the ControlNet's loader and Apply ControlNet."
        )
    return tuple(control for key, control in controls.items() if fitting[key] is None)


class _Left(NamedTuple):
    """A function that a node left on a MODEL: a patch inside the U-Net, or a function around it."""

    function: Any
    is_patch: bool
    remapped: bool

    @property
    def node(self) -> str:
        """The class of the node, where its own method made the function."""
        return str(getattr(self.function, "__qualname__", "")).partition(".")[0]


def _functions(options: Mapping[str, Any]) -> Iterator[_Left]:
    """Every function that nodes have left in a MODEL's options, apart from replacements of attention, whose places are
    known."""
    patches = options["transformer_options"].get("patches", {})
    for patch in (patch for kind in (*ATTENTION_PATCHES, *BLOCK_PATCHES) for patch in patches.get(kind, ())):
        remapped = isinstance(patch, Remapped)
        yield _Left(patch.patch if remapped else patch, True, remapped)
    for option in options.values():
        for function in option if isinstance(option, list) else [option]:
            if callable(function):
                yield _Left(function, False, False)


@dataclass(frozen=True)
class _ByNumbers:
    """A function that keeps SDXL's numbers. ``wrong``: it works on some layers nevertheless, other ones."""

    origin: str
    fault: str
    remedy: str
    wrong: bool


def _by_sdxls_numbers(functions: Iterable[_Left], lineage: Lineage) -> Iterator[_ByNumbers]:
    """The functions that work on blocks that the KOALA lacks, of nodes that are not known by name."""
    koala, known = name(lineage.student), {node.node for node in INCOMPATIBLE_NODES}
    for each in functions:
        if each.node in known or each.remapped:
            continue
        own, stray = places_of(each.function, lineage)
        if own and stray:
            fault = message(
                "goes by SDXL's numbers: {count} of the {total} places of attention in it are on blocks that {model} "
                "lacks ({places}), so it targets the wrong layers",
                count=len(stray),
                total=len(own) + len(stray),
                model=koala,
                places=places(stray),
            )
        elif stray:
            fault = message(
                "it works on attention that {model} lacks ({places}) and has no effect",
                model=koala,
                places=places(stray),
            )
        else:
            continue
        remedy = REMAP
        if not each.is_patch:
            numbers = _all_numbers(lineage)
            remedy = message("set it by {model}'s numbers ({numbers}) or remove it", model=koala, numbers=numbers)
        yield _ByNumbers(made_by(each.function), fault, remedy, bool(own))


def _numbers(lineage: Lineage, part: str) -> Message:
    """SDXL's and KOALA's numbers of one part's blocks, where they differ."""
    pairs = [(sdxl[1], own[1]) for own, sdxl in lineage.blocks.items() if own[0] == part and own != sdxl]
    listed = joined(", ", (message("{sdxl} is its {own}", sdxl=sdxl, own=own) for sdxl, own in pairs))
    return message("SDXL's {part} {pairs}", part=part, pairs=listed)


def _all_numbers(lineage: Lineage) -> Message:
    return joined("; ", (_numbers(lineage, part) for part in ("input", "output")))


def _merge_by_block(model: Model, lineage: Lineage) -> Iterator[str]:
    """A merge that gives SDXL's blocks their own ratios."""
    ratios = {
        (strength, strength_model)
        for key, listed in model.patches.items()
        if re.match(r"diffusion_model\.(input_blocks|output_blocks)\.\d+\.", key)
        for strength, value, strength_model, *_ in listed
        if isinstance(value, list)
    }
    if len(ratios) > 1:
        yield message(
            "a merge with a ratio for each block: the merge node's blocks are SDXL's, and {model} numbers its blocks "
            "differently ({numbers}); merge with one ratio",
            model=name(lineage.student),
            numbers=_all_numbers(lineage),
        )
