"""Patches of attention and blocks that were set by SDXL's block numbers, bound to the KOALA blocks they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...koala.architecture.lineage import BlockId, Lineage

BLOCK_PATCHES = (
    *("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "middle_patch"),
    *("input_block_patch", "input_block_patch_after_skip", "output_block_patch"),
)
"""ComfyUI's patches that are called in every block and ask the options for the block's number."""

Key = tuple[Any, ...]
"""Where a replacement of attention is bound: (block name, number) or (block name, number, transformer block)."""


@dataclass(frozen=True)
class Rebound:
    """A patch that was made for SDXL: while it runs, the options tell it SDXL's numbers.

    Everything else that the host asks of a patch (``to``, ``models``, ``cleanup``) goes to the patch itself.
    """

    patch: Callable[..., Any]
    line: Lineage

    def __call__(self, *arguments: Any) -> Any:
        options = arguments[-1]  # the last argument of every patch that is called inside a block
        here = {name: options[name] for name in ("block", "block_index", "transformer_index") if name in options}
        options.update(as_teacher(self.line, here))
        try:
            return self.patch(*arguments)
        finally:
            options.update(here)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.patch, name)
        return (lambda *arguments: Rebound(found(*arguments), self.line)) if name == "to" else found


def as_teacher(line: Lineage, here: Mapping[str, Any]) -> dict[str, Any]:
    """A running block's numbers as SDXL has them: ``block``, ``block_index`` (transformer block), ``transformer_index``
    (attention module, counted over the whole U-Net)."""
    block = here.get("block")
    if block not in line.blocks:
        return {}
    there: dict[str, Any] = {"block": line.blocks[block]}
    kept = line.attention.get(block, ())
    if here.get("block_index", len(kept)) < len(kept):
        there["block_index"] = kept[here["block_index"]]
    if here.get("transformer_index", len(line.attention_order)) < len(line.attention_order):
        there["transformer_index"] = line.attention_order[here["transformer_index"]]
    return there


class Rebinding(NamedTuple):
    """What became of a MODEL's patches: how many were bound to their KOALA blocks, and which have none."""

    bound: int
    dropped: tuple[Key, ...]


def rebind(options: MutableMapping[str, Any], line: Lineage) -> Rebinding:
    """Bind the patches in a MODEL's ``transformer_options`` (a clone's own) to KOALA's blocks, in place.

    Those that were bound before stay as they are.
    """
    bound = 0
    patches = options.get("patches", {})
    for name in BLOCK_PATCHES:
        if listed := patches.get(name):
            bound += sum(not isinstance(patch, Rebound) for patch in listed)
            patches[name] = [patch if isinstance(patch, Rebound) else Rebound(patch, line) for patch in listed]
    dropped: list[Key] = []
    targets = _targets(line)
    for name, replaced in options.get("patches_replace", {}).items():
        kept = {key: patch for key, patch in replaced.items() if isinstance(patch, Rebound)}
        for key, patch in replaced.items():
            if isinstance(patch, Rebound):
                continue
            if key in targets:
                kept[targets[key]] = Rebound(patch, line)
                bound += 1
            else:
                dropped.append(key)
        options["patches_replace"][name] = kept
    return Rebinding(bound, tuple(dropped))


def unbound(options: Mapping[str, Any], line: Lineage) -> tuple[Key, ...]:
    """Where attention replacements are bound to blocks that KOALA does not have: the mark of SDXL's numbers."""
    own = {*line.attention, *((*block, index) for block, kept in line.attention.items() for index in range(len(kept)))}
    return tuple(
        key
        for name in ("attn1", "attn2")
        for key, patch in options.get("patches_replace", {}).get(name, {}).items()
        if key not in own and not isinstance(patch, Rebound)
    )


def places(keys: Iterable[Key]) -> str:
    """Blocks for a person: "input 4, input 7, output 0 layer 8"; the first few of them."""
    named = dict.fromkeys(f"{key[0]} {key[1]}" + (f" layer {key[2]}" if len(key) > 2 else "") for key in keys)
    return ", ".join(list(named)[:4]) + (" ..." if len(named) > 4 else "")


def _targets(line: Lineage) -> dict[Key, Key]:
    """SDXL's places of attention -> KOALA's."""
    found: dict[Key, Key] = {}
    for block, kept in line.attention.items():
        whole: BlockId = line.blocks[block]
        found[whole] = block
        found |= {(*whole, there): (*block, here) for here, there in enumerate(kept)}
    return found
