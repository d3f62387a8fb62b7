"""Which SDXL layer each KOALA layer came from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from koala_sdxl.koala.architecture.keys import tensors
from koala_sdxl.koala.architecture.layout import (
    KOALA_1_7B,
    KOALA_1B,
    KOALA_700M,
    KOALA_TINY,
    SDXL,
    SSD_1B,
    Layout,
    name,
)
from koala_sdxl.koala.architecture.lineage import KEPT_TRANSFORMERS, Lineage, at_widths_of, is_teacher, lineage

KOALAS = (KOALA_700M, KOALA_1B, KOALA_1_7B, KOALA_TINY)


@pytest.mark.parametrize("layout", KOALAS, ids=name)
def test_every_tensor_has_the_shape_of_its_ancestor(layout: Layout) -> None:
    pairs = lineage(layout).tensors
    assert len(pairs) == len(tensors(layout))
    assert len({whole.diffusers for _, whole in pairs}) == len(pairs)
    assert all(part.shape == whole.shape for part, whole in pairs)


def test_blocks_by_comfyuis_numbers() -> None:
    assert lineage(KOALA_1B).blocks == {
        **{("input", own): ("input", whole) for own, whole in enumerate((0, 1, 3, 4, 6, 7))},
        ("middle", 0): ("middle", 0),
        **{("output", own): ("output", whole) for own, whole in enumerate((0, 2, 3, 5, 6, 8))},
    }
    assert ("middle", 0) not in lineage(KOALA_700M).blocks


@pytest.mark.parametrize("layout", KOALAS, ids=name)
def test_skip_connections_go_by_their_consumer(layout: Layout) -> None:
    assert lineage(layout).skips == (0, 2, 3, 5, 6, 8)


def test_names_in_both_numberings() -> None:
    line = lineage(KOALA_700M)
    diffusers, comfy = line.names("diffusers"), line.names("comfy")
    query = "transformer_blocks.4.attn2.to_q.weight"
    assert diffusers[f"up_blocks.0.attentions.2.{query}"] == f"up_blocks.0.attentions.1.{query}"
    assert f"up_blocks.0.attentions.1.{query}" not in diffusers
    assert comfy[f"output_blocks.2.1.{query}"] == f"output_blocks.1.1.{query}"
    assert comfy["output_blocks.2.2.conv.weight"] == "output_blocks.1.2.conv.weight"
    assert comfy["input_blocks.6.0.op.weight"] == "input_blocks.4.0.op.weight"
    assert len(diffusers) == len(comfy) == 584


def test_a_table_of_other_layers_is_followed() -> None:
    table = {**KEPT_TRANSFORMERS[KOALA_700M], "up_blocks.0.attentions.1": (0, 3, 4, 7, 9)}
    line = Lineage(KOALA_700M, table)
    assert line.ancestor("up_blocks.0.attentions.1.transformer_blocks.3.ff.net.2.weight") == (
        "up_blocks.0.attentions.2.transformer_blocks.7.ff.net.2.weight"
    )
    assert line.attention["output", 1] == (0, 3, 4, 7, 9)
    removed = {
        module.split(".transformer_blocks.")[1].split(".")[0]: kept.split(".transformer_blocks.")[1].split(".")[0]
        for module, kept in line.neighbours.items()
        if module.startswith("up_blocks.0.attentions.2.") and module.endswith("attn1.to_q")
    }
    # 1 lies between 0 and 3, nearer 0; 8 between 7 and 9, the earlier of the two
    assert removed == {"1": "0", "2": "1", "5": "2", "6": "3", "8": "3"}


def test_neighbours_are_for_removed_blocks_of_kept_modules_only() -> None:
    line = lineage(KOALA_1B)
    kept = {whole.diffusers.rpartition(".")[0] for _, whole in line.tensors}
    own = {part.diffusers.rpartition(".")[0] for part, _ in line.tensors}
    assert not kept & line.neighbours.keys()
    assert set(line.neighbours.values()) <= own
    assert not any(module.startswith("down_blocks.2.attentions.1.") for module in line.neighbours)
    assert lineage(KOALA_1_7B).neighbours == {}


def test_attention_modules_are_counted_as_sdxl_counts_them() -> None:
    assert lineage(KOALA_700M).attention_order == (0, 2, 5, 7, 8, 10)
    assert lineage(KOALA_1B).attention_order == (0, 2, 4, 5, 7, 8, 10)


def test_cut_keeps_the_values() -> None:
    whole = {tensor.comfy: number for number, tensor in enumerate(tensors(SDXL))}
    part = lineage(KOALA_1B).cut(whole, "comfy")
    assert set(part) == {tensor.comfy for tensor in tensors(KOALA_1B)}
    assert (
        part["middle_block.1.transformer_blocks.5.norm1.bias"]
        == whole["middle_block.1.transformer_blocks.5.norm1.bias"]
    )
    assert part["output_blocks.3.0.in_layers.2.weight"] == whole["output_blocks.5.0.in_layers.2.weight"]


def test_widths_do_not_matter_but_layers_do() -> None:
    wide = replace(KOALA_1B, channels=(64, 128, 256), context=32)
    assert lineage(wide).teacher == at_widths_of(wide, SDXL)
    assert is_teacher(lineage(wide).teacher)
    assert not is_teacher(KOALA_1B)
    assert lineage(SSD_1B).skips == tuple(range(9))
    with pytest.raises(
        ValueError, match=r"^no table says which of SDXL's transformer blocks the custom SDXL sub-netwo"
    ):
        _ = lineage(SSD_1B).transformers
    with pytest.raises(ValueError, match=r"^the custom SDXL sub-network .* cannot be cut out of SDXL"):
        lineage(replace(KOALA_1B, in_channels=9))
