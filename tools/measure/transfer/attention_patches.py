"""In which cross-attention layers of a KOALA the patches of an SDXL IP-Adapter run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from koala_sdxl.koala.architecture.layout import SDXL, Layout, blocks
from koala_sdxl.koala.architecture.lineage import Lineage, lineage
from koala_sdxl.nodes.adapt import KoalaAttentionPatches
from tools.measure.transfer.models import conditioning, pair, sample, small, unguarded
from tools.synthetic.adapters import SMALL_SDXL

Place = tuple[Any, ...]
"""A transformer block as ComfyUI names it while it runs: block name, block number, index in the attention module."""


class PatchedLayers(NamedTuple):
    """Cross-attention layers of a KOALA by what an SDXL IP-Adapter's patches did in them: the patch of the layer that
    they came from, of another layer of the same width, of a layer of another width, or none."""

    right: int
    other: int
    width: int
    untouched: int


def ip_adapter(patched: Any, patch: Callable[[Place], Any]) -> Any:
    """A clone with a patch on each of SDXL's cross-attention layers, by SDXL's numbers, as IP-Adapter packs set them.

    ``patch`` makes the function for a place: (block name, block number, transformer block).
    """
    clone = patched.clone()
    for place in attention_places(SDXL):
        clone.set_model_attn2_replace(patch(place), *place)
    return clone


def attention_places(layout: Layout) -> dict[Place, int]:
    """A U-Net's cross-attention layers as ComfyUI names their places -> their width."""
    sides = {"down": "input", "middle": "middle", "up": "output"}
    return {
        (sides[block.part], block.n, index): block.c_out for block in blocks(layout) for index in range(block.depth)
    }


def patched_layers(koala: Layout, ours: bool) -> PatchedLayers:
    """One pass of a small KOALA with an SDXL IP-Adapter's patches on it: which of them ran in which layer."""
    _, model = pair(koala)
    origin = lineage(small(koala))
    ran: dict[Place, Place] = {}

    def patch(place: Place) -> Any:
        def replacement(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
            ran[running[-1]] = place
            return q

        return replacement

    running: list[Place] = []
    patched = ip_adapter(model, patch)
    if ours:
        patched = KoalaAttentionPatches.execute(patched).result[0]

    # where the U-Net is, told by a patch that runs just before, with KOALA's own numbers
    def here(n: Any, context: Any, value: Any, options: dict[str, Any]) -> Any:
        running.append((*options["block"], options["block_index"]))
        return n, context, value

    patched.set_model_attn2_patch(here)
    sample(unguarded(patched), conditioning(origin.student))
    widths, sdxl_widths = attention_places(origin.student), attention_places(SMALL_SDXL)
    counts = Counter(_judged(origin, place, ran.get(place), widths, sdxl_widths) for place in widths)
    return PatchedLayers(counts["right"], counts["other"], counts["width"], counts["untouched"])


def _judged(
    origin: Lineage,
    place: Place,
    ran: Place | None,
    widths: Mapping[Place, int],
    sdxl_widths: Mapping[Place, int],
) -> str:
    if ran is None:
        return "untouched"
    block, index = place[:2], place[2]
    if ran == (*origin.blocks[block], origin.attention[block][index]):
        return "right"
    return "other" if sdxl_widths[ran] == widths[place] else "width"
