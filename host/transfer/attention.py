"""Attention and block patches that were set by SDXL's block numbers, remapped to the KOALA blocks they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...koala.architecture.lineage import Lineage

ATTENTION_PATCHES = ("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "middle_patch")
"""ComfyUI's patches that run in every transformer block and read its number, and its block's, from the options."""
BLOCK_PATCHES = ("input_block_patch", "input_block_patch_after_skip", "output_block_patch")
"""ComfyUI's patches that run in every block and read the block's number from the options."""
ATTENTION_REPLACEMENTS = "patches_replace"
"""Key of the options that holds what replaces attention in one place: kind -> place -> function."""

Place = tuple[Any, ...]
"""Where attention is replaced: (block name, number) or (block name, number, transformer block)."""


@dataclass(frozen=True)
class Remapped:
    """A patch that was made for SDXL: while it runs, it reads SDXL's numbers in the options.

    Everything else that the host asks of a patch (``to``, ``models``, ``cleanup``) goes to the patch itself.
    """

    patch: Callable[..., Any]
    lineage: Lineage

    def __call__(self, *arguments: Any) -> Any:
        options = arguments[-1]  # the last argument of every patch that is called inside a block
        own = {name: options[name] for name in ("block", "block_index", "transformer_index") if name in options}
        options.update(sdxl_numbers(self.lineage, own))
        try:
            return self.patch(*arguments)
        finally:
            options.update(own)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.patch, name)
        return (lambda *arguments: Remapped(attribute(*arguments), self.lineage)) if name == "to" else attribute


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
    """How many of a MODEL's patches were remapped to KOALA's blocks, and the places of those that have no block."""

    remapped: int
    dropped: tuple[Place, ...]


def remap(options: MutableMapping[str, Any], lineage: Lineage) -> Remapping:
    """Remap the patches in a MODEL's ``transformer_options`` (a clone's own) to KOALA's blocks, in place.

    Those that were remapped before are left alone. Raises ValueError for attention patches where nothing says which
    transformer blocks the model kept.
    """
    patches, replacements = options.get("patches", {}), options.get(ATTENTION_REPLACEMENTS, {})
    if any(patches.get(name) for name in ATTENTION_PATCHES) or any(replacements.values()):
        lineage.require_transformers()
    count = 0
    for name in (*ATTENTION_PATCHES, *BLOCK_PATCHES):
        if listed := patches.get(name):
            count += sum(not isinstance(patch, Remapped) for patch in listed)
            patches[name] = [patch if isinstance(patch, Remapped) else Remapped(patch, lineage) for patch in listed]
    dropped: list[Place] = []
    targets = _targets(lineage) if replacements else {}
    for name, by_place in replacements.items():
        remapped = {place: patch for place, patch in by_place.items() if isinstance(patch, Remapped)}
        for place, patch in by_place.items():
            if isinstance(patch, Remapped):
                continue
            if place in targets:
                remapped[targets[place]] = Remapped(patch, lineage)
                count += 1
            else:
                dropped.append(place)
        replacements[name] = remapped
    return Remapping(count, tuple(dropped))


def unmatched(options: Mapping[str, Any], lineage: Lineage) -> tuple[Place, ...]:
    """Places of attention replacements on blocks that the KOALA lacks: they were set by SDXL's numbers."""
    own = {*lineage.depths, *((*block, index) for block, depth in lineage.depths.items() for index in range(depth))}
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


def _targets(lineage: Lineage) -> dict[Place, Place]:
    """SDXL's places of attention -> KOALA's."""
    targets: dict[Place, Place] = {}
    for own, kept in lineage.attention.items():
        sdxl: Place = lineage.blocks[own]
        targets[sdxl] = own
        targets |= {(*sdxl, there): (*own, here) for here, there in enumerate(kept)}
    return targets
