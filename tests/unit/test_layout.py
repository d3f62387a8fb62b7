"""The layouts as data, against the model card's figures and diffusers' own blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from koala_sdxl.koala.architecture.keys import parameters, tensors
from koala_sdxl.koala.architecture.layout import (
    KOALA_1_7B,
    KOALA_1B,
    KOALA_700M,
    KOALA_NAMES,
    KOALA_TINY,
    SDXL,
    SSD_1B,
    VEGA,
    Layout,
    blocks,
    compact,
    fault,
    is_subnetwork,
    name,
)


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        (SDXL, 2_567_463_684),
        (KOALA_1_7B, 1_717_277_764),
        (KOALA_1B, 1_161_184_324),
        (KOALA_700M, 782_822_724),
        (compact(10, middle=False), 1_304_160_324),
    ],
)
def test_parameter_counts_are_the_published_ones(layout: Layout, count: int) -> None:
    assert parameters(layout) == count


@pytest.mark.parametrize(("layout", "count"), [(KOALA_700M, 584), (KOALA_1B, 790), (SDXL, 1680)])
def test_tensor_counts(layout: Layout, count: int) -> None:
    assert len(tensors(layout)) == count


@pytest.mark.parametrize(
    ("layout", "part", "depths"),
    [
        (KOALA_700M, "down", [0, 2, 5]),
        (KOALA_700M, "middle", []),
        (KOALA_700M, "up", [5, 5, 2, 2, 0, 0]),
        (KOALA_1B, "down", [0, 2, 6]),
        (KOALA_1B, "middle", [6, 0]),
        (SDXL, "down", [0, 0, 2, 2, 10, 10]),
        (SDXL, "middle", [10, 0]),
        (SDXL, "up", [10, 10, 10, 2, 2, 2, 0, 0, 0]),
        (SSD_1B, "middle", [0]),
        (SSD_1B, "up", [4, 4, 10, 2, 1, 1, 0, 0, 0]),
    ],
)
def test_residual_layers_and_their_depths(layout: Layout, part: str, depths: list[int]) -> None:
    assert [block.depth for block in blocks(layout) if (block.kind, block.part) == ("resnet", part)] == depths


@pytest.mark.parametrize("layout", [*KOALA_NAMES, SDXL, SSD_1B, VEGA], ids=name)
def test_every_stage_but_the_last_is_resampled(layout: Layout) -> None:
    assert [(b.kind, b.stage) for b in blocks(layout) if b.kind != "resnet"] == [
        *(("downsample", 0), ("downsample", 1)),
        *(("upsample", 0), ("upsample", 1)),
    ]


def test_way_up_takes_each_skip_once() -> None:
    """KOALA's up layers read what its down layers wrote: 1280 + 1280, then 1280 + 640, and so on."""
    ups = [block for block in blocks(KOALA_700M) if (block.kind, block.part) == ("resnet", "up")]
    assert [(block.c_in, block.c_out) for block in ups] == [
        *((2560, 1280), (1920, 1280)),
        *((1920, 640), (960, 640)),
        *((960, 320), (640, 320)),
    ]


@pytest.mark.parametrize("layout", [*KOALA_NAMES, SDXL], ids=name)
def test_blocks_follow_each_other_in_width(layout: Layout) -> None:
    width, skipped = layout.channels[0], 0
    for block in blocks(layout):
        if (block.kind, block.part) == ("resnet", "up"):
            assert block.c_in > width
            skipped += block.c_in - width
        else:
            assert block.c_in == width
        width = block.c_out
    down = [block.c_out for block in blocks(layout) if block.part == "down"]
    assert skipped == layout.channels[0] + sum(down)
    assert width == layout.channels[0]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (SDXL, True),
        (KOALA_700M, True),
        (KOALA_1B, True),
        (KOALA_1_7B, True),
        (KOALA_TINY, True),
        (SSD_1B, True),
        (VEGA, True),
        (replace(SDXL, down=((0, 0), (2, 2), (10, 11))), False),
        (replace(SDXL, down=((0, 0, 0), (2, 2), (10, 10))), False),
        (replace(SDXL, down=((0, 0), (0, 0), (10, 10))), False),
        (replace(SDXL, down=((1, 1), (2, 2), (10, 10))), False),
        (replace(SDXL, up=((10, 10, 10), (3, 2, 2), (0, 0, 0))), False),
        (replace(SDXL, middle=11), False),
        (replace(SDXL, in_channels=9), False),
        (replace(SDXL, out_channels=8), False),
        (Layout(channels=(320, 640), down=((0,), (2,)), up=((2, 2), (0, 0)), middle=2), False),
    ],
)
def test_subnetwork_of_sdxl(part: Layout, expected: bool) -> None:
    assert is_subnetwork(part) is expected


def test_no_koala_contains_a_larger_one() -> None:
    by_size = [KOALA_700M, KOALA_1B, KOALA_1_7B, SDXL]
    for index, whole in enumerate(by_size):
        assert all(is_subnetwork(part, whole) for part in by_size[:index])
        assert not any(is_subnetwork(larger, whole) for larger in by_size[index + 1 :])


def test_names() -> None:
    assert [name(layout) for layout in KOALA_NAMES] == ["KOALA-700M", "KOALA-1B", "KOALA-1.7B", "koala-tiny"]
    unnamed = name(compact(4, middle=False))
    for part in ("custom", "layers 1/1/1", "depth 0/2/4", "no middle block", "320 channels"):
        assert part in unnamed
    assert "middle block depth 3" in name(compact(3, middle=True))


def test_pooled_width_is_what_the_six_size_ids_leave() -> None:
    assert (SDXL.pooled, KOALA_TINY.pooled) == (1280, 64)
    assert (SDXL.time_width, KOALA_TINY.time_width) == (1280, 128)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"channels": (33, 66, 132)}, "a stage of 33 channels; expected a multiple of 32"),
        ({"channels": (32, 96, 128)}, "a stage of 96 channels; expected a multiple of 64"),
        ({"channels": (128, 192, 256)}, "a stage of 192 channels; expected a multiple of the first stage's 128"),
        ({"channels": (0, 64, 128)}, "a stage of 0 channels; expected a multiple of 32"),
        ({"context": 0}, "a text context of width 0"),
        ({"added": 1536}, "1536 added channels; expected more than the size ids' 1536"),
    ],
    ids=str,
)
def test_sizes_of_no_network(changes: dict[str, Any], says: str) -> None:
    assert fault(replace(KOALA_700M, **changes)) == says


@pytest.mark.parametrize("known", [*KOALA_NAMES, SDXL, SSD_1B, VEGA], ids=name)
def test_every_known_layout_is_sound(known: Layout) -> None:
    assert fault(known) == ""
