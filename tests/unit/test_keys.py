"""The table of tensor names and shapes, against the networks that diffusers builds and the rules of its converters."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import permutations

import pytest
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from koala_sdxl.koala.architecture.detection import guess_numbering, read_layout
from koala_sdxl.koala.architecture.keys import (
    NUMBERINGS,
    Numbering,
    coverage,
    names,
    renaming,
    tensors,
)
from koala_sdxl.koala.architecture.layout import (
    KOALA_1_7B,
    KOALA_1B,
    KOALA_700M,
    KOALA_TINY,
    SDXL,
    SSD_1B,
    VEGA,
    Layout,
    is_subnetwork,
    name,
)
from tests.unit import files, reference

LAYOUTS = (KOALA_700M, KOALA_1B, KOALA_1_7B, KOALA_TINY, SDXL, SSD_1B, VEGA)
SEEDS = range(12)


def subnetwork(seed: int) -> Layout:
    """A random cut of SDXL: one or two layers a stage, transformers of any depth, with or without a middle block."""
    draw = random.Random(seed)
    layers = [draw.randint(1, 2) for _ in SDXL.down]

    def stage(deepest: int, count: int) -> tuple[int, ...]:
        return tuple(min(deepest, draw.randint(1, 10)) for _ in range(count))

    limits = [max(depths) for depths in SDXL.down]
    down = tuple(stage(*pair) for pair in zip(limits, layers, strict=True))
    up = tuple(stage(limit, count + 1) for limit, count in zip(limits[::-1], layers[::-1], strict=True))
    return Layout(down=down, middle=draw.choice([None, 0, down[-1][0]]), up=up)


def without_attention(seed: int) -> Layout:
    """The same with single layers that have lost their transformer (never the only one of a stage)."""
    draw = random.Random(seed)
    layout = subnetwork(seed)

    def thin(stages: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(depth if index == 0 else depth * draw.randint(0, 1) for index, depth in enumerate(stage))
            for stage in stages
        )

    return Layout(down=thin(layout.down), middle=layout.middle, up=thin(layout.up))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_names_and_shapes_are_those_of_diffusers_unet(layout: Layout) -> None:
    assert files.unet(layout) == reference.unet(layout)


def test_random_subnetworks_are_those_of_diffusers_unet() -> None:
    for seed in SEEDS[:2]:
        assert files.unet(subnetwork(seed)) == reference.unet(subnetwork(seed)), seed


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_comfy_names_are_those_that_diffusers_reads_back(layout: Layout) -> None:
    """diffusers' single-file reader numbers the blocks of any U-Net without gaps, as ComfyUI does."""
    marked = {tensor.comfy: tensor for tensor in tensors(layout)}
    config = {"addition_embed_type": "text_time", "layers_per_block": len(layout.down[0])}
    converted = convert_ldm_unet_checkpoint({f"model.diffusion_model.{key}": key for key in marked}, config)
    assert converted == renaming(layout, "diffusers", "comfy")


def script_name(diffusers: str) -> str:
    """The rule of diffusers' convert_diffusers_to_original_sdxl.py: three blocks a stage, whatever the U-Net has."""
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    ends = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    module, kind = diffusers.rsplit(".", 1)
    if module in ends:
        return f"{ends[module]}.{kind}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0\.conv", module):
        stage = int(found[2])
        down = found[1] == "down"
        return f"input_blocks.{3 * (stage + 1)}.0.op.{kind}" if down else f"output_blocks.{3 * stage + 2}.2.conv.{kind}"
    found = re.fullmatch(r"(?:mid_block|(down|up)_blocks\.(\d))\.(resnets|attentions)\.(\d)\.(.+)", module)
    assert found, diffusers
    way, layer, rest = found[1], int(found[4]), found[5]
    residual = found[3] == "resnets"
    rest = inside[rest] if residual else rest
    if way is None:
        return f"middle_block.{2 * layer if residual else 1}.{rest}.{kind}"
    stage = int(found[2])
    block = f"input_blocks.{3 * stage + layer + 1}" if way == "down" else f"output_blocks.{3 * stage + layer}"
    return f"{block}.{0 if residual else 1}.{rest}.{kind}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_script_names_follow_the_conversion_scripts_rule(layout: Layout) -> None:
    for tensor in tensors(layout):
        assert tensor.script == script_name(tensor.diffusers)


def test_script_leaves_gaps_only_where_layers_are_missing() -> None:
    def numbers(layout: Layout, numbering: Numbering, part: str) -> list[int]:
        return sorted({int(key.split(".")[1]) for key in names(layout, numbering) if key.startswith(part)})

    assert numbers(KOALA_700M, "comfy", "input_blocks.") == [0, 1, 2, 3, 4, 5]
    assert numbers(KOALA_700M, "script", "input_blocks.") == [0, 1, 3, 4, 6, 7]
    assert numbers(KOALA_700M, "comfy", "output_blocks.") == [0, 1, 2, 3, 4, 5]
    assert names(SDXL, "script") == names(SDXL, "comfy")


def test_an_upsampler_moves_up_where_there_is_no_transformer_before_it() -> None:
    """ComfyUI counts the modules of a block: residual layer, transformer if any, upsampler if any."""
    layout = replace(KOALA_700M, up=((5, 0), (2, 2), (0, 0)))
    upsampler = "up_blocks.0.upsamplers.0.conv.weight"
    assert renaming(KOALA_700M, "diffusers", "comfy")[upsampler] == "output_blocks.1.2.conv.weight"
    assert renaming(layout, "diffusers", "comfy")[upsampler] == "output_blocks.1.1.conv.weight"
    assert renaming(layout, "diffusers", "script")[upsampler] == "output_blocks.2.2.conv.weight"


@pytest.mark.parametrize(("source", "target"), list(permutations(NUMBERINGS, 2)))
def test_renaming_is_one_to_one_and_undone_by_its_reverse(source: Numbering, target: Numbering) -> None:
    for layout in (*LAYOUTS, *map(without_attention, SEEDS)):
        there = renaming(layout, source, target)
        back = renaming(layout, target, source)
        assert len(there) == len(set(there.values())) == len(tensors(layout))
        assert all(back[there[key]] == key for key in there)


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_layout_is_read_back_from_every_numbering(numbering: Numbering) -> None:
    for layout in (*LAYOUTS, *map(subnetwork, SEEDS), *map(without_attention, SEEDS)):
        found = list(files.unet(layout, numbering).items())
        random.Random(len(found)).shuffle(found)  # a file may list its tensors in any order
        read, told = read_layout(dict(found))
        assert (read, is_subnetwork(read)) == (layout, True)
        same = names(layout, numbering) == names(layout, "comfy")
        assert told == ("comfy" if same else numbering)


def test_numbering_is_told_from_block_names() -> None:
    assert guess_numbering(["conv_in.weight", "up_blocks.0.x"]) == "diffusers"
    assert guess_numbering(["out.0.weight", "output_blocks.0.x"]) == "comfy"
    with pytest.raises(ValueError, match="no U-Net blocks"):
        guess_numbering(["conv_in.weight", "out.0.weight"])


@pytest.mark.parametrize(
    ("drop", "fault"),
    [
        ("attn2.", "no cross-attention"),
        ("up_blocks.1.", "do not mirror"),
        ("down_blocks.0.resnets.", "do not mirror|resnets"),
        ("conv_in.", "conv_in.weight"),
        ("add_embedding.", "add_embedding.linear_1.weight"),
    ],
)
def test_unreadable_names_are_refused(drop: str, fault: str) -> None:
    found = {key: shape for key, shape in files.unet(KOALA_700M).items() if drop not in key}
    with pytest.raises((KeyError, ValueError), match=fault):
        read_layout(found)


def test_a_hostile_transformer_index_does_not_grow_the_layout() -> None:
    found = {**files.unet(KOALA_700M), f"up_blocks.0.attentions.0.transformer_blocks.{10**12}.norm1.weight": (1280,)}
    assert max(max(stage) for stage in read_layout(found)[0].up) == 6


def test_coverage_counts_both_sides_and_shapes() -> None:
    found = files.unet(KOALA_700M)
    assert coverage(KOALA_700M, "diffusers", found).exact
    del found["conv_in.bias"]
    found |= {"conv_out.weight": (4, 320, 1, 1), "spare": (1,)}
    cover = coverage(KOALA_700M, "diffusers", found)
    assert not cover.exact
    assert (cover.missing, cover.extra) == (("conv_in.bias",), ("spare",))
    assert cover.misshapen == ("conv_out.weight [4, 320, 1, 1] instead of [4, 320, 3, 3]",)
