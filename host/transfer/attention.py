"""Attention and block patches that were set by SDXL's block numbers, remapped to the KOALA blocks they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...koala.architecture.layout import name
from ...koala.architecture.lineage import Lineage
from ...koala.words import message
from .places import Place, own_places, share_state, transformer_weights
from .references import made_by

ATTENTION_PATCHES = ("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "middle_patch")
"""ComfyUI's patches that run in every transformer block and read its number, and its block's, from the options."""
BLOCK_PATCHES = ("input_block_patch", "input_block_patch_after_skip", "output_block_patch")
"""ComfyUI's patches that run in every block and read the block's number from the options."""
ATTENTION_REPLACEMENTS = "patches_replace"
"""Key of the options that holds what replaces attention in one place: kind -> place -> function."""


@dataclass(frozen=True)
class Remapped:
    """A patch that was made for SDXL: while it runs, it reads SDXL's numbers in the options.

    Everything else that the host asks of a patch (``to``, ``models``, ``cleanup``) goes to the patch itself.
    """

    patch: Callable[..., Any]
    lineage: Lineage

    def __call__(self, *arguments: Any) -> Any:
        options = arguments[-1]  # the last argument of every patch that is called inside a block
        own = {key: options[key] for key in ("block", "block_index", "transformer_index") if key in options}
        options.update(sdxl_numbers(self.lineage, own))
        try:
            return self.patch(*arguments)
        finally:
            options.update(own)

    def __getattr__(self, name: str) -> Any:
        own = getattr(self.patch, name)
        return (lambda *arguments: Remapped(own(*arguments), self.lineage)) if name == "to" else own


def sdxl_numbers(lineage: Lineage, own: Mapping[str, Any]) -> dict[str, Any]:
    """A running block's numbers as SDXL has them: ``block``, ``block_index`` (transformer block), ``transformer_index``
    (attention module, counted over the whole U-Net)."""
    block = own.get("block")
    if block not in lineage.blocks:
        return {}
    numbers: dict[str, Any] = {"block": lineage.blocks[block]}
    if lineage.kept_transformers is not None:  # without it only block patches are remapped, which do not use the index
        kept = lineage.attention.get(block, ())
        if own.get("block_index", len(kept)) < len(kept):
            numbers["block_index"] = kept[own["block_index"]]
    if own.get("transformer_index", len(lineage.attention_order)) < len(lineage.attention_order):
        numbers["transformer_index"] = lineage.attention_order[own["transformer_index"]]
    return numbers


class Remapping(NamedTuple):
    """How many of a MODEL's patches were remapped to KOALA's blocks; places and patches that have no block there."""

    remapped: int
    dropped: tuple[tuple[Place, Any], ...]


class Idle(NamedTuple):
    """Remapped patches whose weights are for transformers of SDXL that a KOALA lacks: they have no effect.

    ``transformers``: those that have a weight; ``lost``: those of them that the KOALA lacks.
    """

    patches: int
    of: int
    transformers: tuple[int, ...]
    lost: tuple[int, ...]


def remap(options: MutableMapping[str, Any], lineage: Lineage) -> Remapping:
    """Remap the patches in a MODEL's ``transformer_options`` (a clone's own) to KOALA's blocks, in place.

    Those that were remapped before are left alone. Raises ValueError for attention patches where nothing says which
    transformer blocks the model kept.
    """
    patches, replacements = options.get("patches", {}), options.get(ATTENTION_REPLACEMENTS, {})
    if any(patches.get(kind) for kind in ATTENTION_PATCHES) or any(replacements.values()):
        lineage.require_transformers()
    count = 0
    for kind in (*ATTENTION_PATCHES, *BLOCK_PATCHES):
        if listed := patches.get(kind):
            count += sum(not isinstance(patch, Remapped) for patch in listed)
            patches[kind] = [patch if isinstance(patch, Remapped) else Remapped(patch, lineage) for patch in listed]
    dropped: list[tuple[Place, Any]] = []
    targets = _targets(lineage) if replacements else {}
    for kind, by_place in replacements.items():
        remapped = {place: patch for place, patch in by_place.items() if isinstance(patch, Remapped)}
        for place, patch in by_place.items():
            if isinstance(patch, Remapped):
                continue
            if place in targets:
                remapped[targets[place]] = Remapped(patch, lineage)
                count += 1
            else:
                dropped.append((place, patch))
        replacements[kind] = remapped
    return Remapping(count, tuple(dropped))


def drop_companions(model_options: MutableMapping[str, Any], remapping: Remapping) -> list[str]:
    """Take functions around cfg off a MODEL's options (a clone's own) that count on dropped attention patches: they
    share variables with those, and with no patch that is left. Returns a line on each for a report."""
    gone = [patch for _, patch in remapping.dropped]
    left = [patch.patch for patch in _remapped(model_options["transformer_options"]).values()]
    dropped: list[str] = []
    for key, held in list(model_options.items()):
        functions = held if isinstance(held, list) else [held] if callable(held) else []
        lost = [function for function in functions if share_state(function, gone) and not share_state(function, left)]
        dropped += [
            message(
                "dropped: {what} of {node}: it counts on attention patches that were dropped",
                what=key,
                node=made_by(function),
            )
            for function in lost
        ]
        if lost and isinstance(held, list):
            model_options[key] = [function for function in held if function not in lost]
        elif lost:
            del model_options[key]
    return dropped


def idle(options: Mapping[str, Any], lineage: Lineage) -> Idle:
    """The remapped patches that have no effect, as their weights are for other transformers than theirs."""
    weighted: set[int] = set()
    count, patches = 0, _remapped(options)
    order, blocks = lineage.attention_order, list(lineage.depths)
    for (_, place), patch in patches.items():
        weights = transformer_weights(patch.patch, len(_transformers(lineage)))
        if weights is not None:
            weighted |= weights.keys()
            count += order[blocks.index(place[:2])] not in weights
    lost = weighted - set(order)
    return Idle(count if lost else 0, len(patches), tuple(sorted(weighted)), tuple(sorted(lost)))


def idle_line(options: Mapping[str, Any], lineage: Lineage) -> list[str]:
    """A line on them for a report; none where every patch has an effect."""
    found = idle(options, lineage)
    if not found.patches:
        return []
    koala, blocks = name(lineage.student), _transformers(lineage)

    def listed(indices: Iterable[int]) -> str:
        return ", ".join(f"{index} ({places([blocks[index]])})" for index in indices)

    all_of_them = listed(found.transformers)
    values: dict[str, object] = {
        "count": found.patches,
        "total": found.of,
        "model": koala,
        "lost": listed(found.lost),
        "transformers": message("transformer {numbers}", numbers=all_of_them)
        if len(found.transformers) == 1
        else message("transformers {numbers}", numbers=all_of_them),
    }
    if found.lost == found.transformers:
        return [
            message(
                "{count} of the {total} remapped patches have no effect: their weights are for SDXL's {transformers}, "
                "which {model} lacks (IP-Adapter's style is transformer 6, its composition 3); choose one weight for "
                "all",
                **values,
            )
        ]
    return [
        message(
            "{count} of the {total} remapped patches have no effect: their weights are for SDXL's {transformers}, of "
            "which {model} lacks {lost} (IP-Adapter's style is transformer 6, its composition 3); choose one weight "
            "for all",
            **values,
        )
    ]


def unmatched(options: Mapping[str, Any], lineage: Lineage) -> tuple[Place, ...]:
    """Places of attention replacements on blocks that the KOALA lacks: they were set by SDXL's numbers."""
    own = own_places(lineage)
    return tuple(
        place
        for kind in ("attn1", "attn2")
        for place, patch in options.get(ATTENTION_REPLACEMENTS, {}).get(kind, {}).items()
        if place not in own and not isinstance(patch, Remapped)
    )


def places(keys: Iterable[Place]) -> str:
    """Places for a person: "input 4, input 7, output 0 layer 8"; the first few of them."""
    named = dict.fromkeys(f"{key[0]} {key[1]}" + (f" layer {key[2]}" if len(key) > 2 else "") for key in keys)
    return ", ".join(list(named)[:4]) + (" ..." if len(named) > 4 else "")


def _remapped(options: Mapping[str, Any]) -> dict[tuple[str, Place], Remapped]:
    """Replacements that were remapped, by their kind and KOALA's place."""
    kinds = options.get(ATTENTION_REPLACEMENTS, {})
    return {
        (kind, place): patch
        for kind, by_place in kinds.items()
        for place, patch in by_place.items()
        if isinstance(patch, Remapped)
    }


def _transformers(lineage: Lineage) -> tuple[Place, ...]:
    """SDXL's blocks with attention, in the order in which ComfyUI counts them."""
    return tuple(Lineage(lineage.teacher).depths)


def _targets(lineage: Lineage) -> dict[Place, Place]:
    """SDXL's places of attention -> KOALA's."""
    targets: dict[Place, Place] = {}
    for own, kept in lineage.attention.items():
        sdxl: Place = lineage.blocks[own]
        targets[sdxl] = own
        targets |= {(*sdxl, there): (*own, here) for here, there in enumerate(kept)}
    return targets
