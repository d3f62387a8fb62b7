"""Buckets of aspect ratios, pictures cut to them, and batches of one bucket."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image

from koala_sdxl.distill.buckets import Batches, buckets, fit, nearest
from koala_sdxl.distill.errors import UserError
from tests.dev.distill_pictures import picture

# --- buckets -----------------------------------------------------------------------------------------------------


def test_the_buckets_are_those_of_sdxl() -> None:
    found = buckets(1024, 64, 2.0)
    assert {(1024, 1024), (1152, 896), (896, 1152), (832, 1216), (1216, 832), (1344, 768), (768, 1344)} <= set(found)
    assert {(512, 2048), (1600, 640), (576, 1792), (1472, 704)} <= set(buckets(1024, 64, 4.0))


@pytest.mark.parametrize("resolution", [64, 500, 512, 1000, 1024])
@pytest.mark.parametrize("step", [8, 32, 64])
@pytest.mark.parametrize("aspect", [1.0, 1.5, 2.0, 4.0])
def test_no_side_of_a_bucket_has_room_to_grow(resolution: int, step: int, aspect: float) -> None:
    found = buckets(resolution, step, aspect)
    square = resolution // step * step
    assert len(set(found)) == len(found)
    assert set(found) == {(height, width) for width, height in found}
    assert (square, square) in found
    for width, height in found:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= aspect * min(width, height)
        if (width, height) != (square, square):
            assert min((width + step) * height, width * (height + step)) > resolution**2
    assert aspect > 1 or found == ((square, square),)


def test_buckets_that_cannot_be_are_a_problem() -> None:
    with pytest.raises(UserError, match=r"data\.bucket_step = 20 is not a multiple of 8.*Set it to 24"):
        buckets(64, 20, 2.0)
    with pytest.raises(UserError, match=r"data\.resolution = 48 is less than data\.bucket_step = 64"):
        buckets(48, 64, 2.0)


def test_the_nearest_bucket_is_that_of_the_nearest_aspect_ratio() -> None:
    choices = buckets(1024, 64, 2.0)
    assert nearest(4000, 4000, choices) == (1024, 1024)
    assert nearest(3000, 2000, choices) == (1216, 832)
    assert nearest(200, 300, choices) == (832, 1216)
    assert nearest(9000, 100, choices) == (1344, 768)
    for width, height in choices:
        assert nearest(2 * width, 2 * height, choices) == (width, height)


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def test_a_picture_is_cut_in_the_middle_or_anywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    found, offsets = fit(ramp(101, 64), (64, 64), "center", generator)
    assert (found.dtype, found.shape, offsets) == (torch.float32, (3, 64, 64), (0, 18))
    assert found[0, 0].tolist() == pytest.approx([(18 + x) / 127.5 - 1 for x in range(64)])
    assert found[1, :, 0].tolist() == pytest.approx([y / 127.5 - 1 for y in range(64)])
    seen = set()
    for _ in range(60):
        found, (top, left) = fit(ramp(64, 68), (64, 64), "random", generator)
        assert left == 0
        assert found[1, 0, 0] == pytest.approx(top / 127.5 - 1)
        seen.add(top)
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("size", [(200, 100), (100, 201), (33, 31), (64, 64), (641, 333)])
def test_a_picture_is_scaled_until_it_covers_its_bucket(size: tuple[int, int]) -> None:
    found, (top, left) = fit(picture(*size), (64, 48), "center", torch.Generator())
    assert found.shape == (3, 48, 64)
    assert found.amin((1, 2)).tolist() == pytest.approx([200 / 127.5 - 1, 40 / 127.5 - 1, 40 / 127.5 - 1])
    scale = max(64 / size[0], 48 / size[1])
    assert (left, top) == ((round(size[0] * scale) - 64) // 2, (round(size[1] * scale) - 48) // 2)


# --- batches -----------------------------------------------------------------------------------------------------

OF = [0] * 10 + [1] * 3 + [2] * 1 + [0] * 7  # 17 of one bucket: 5 batches of 4; and one batch for each of the others


def test_every_epoch_has_every_sample_in_batches_of_one_bucket() -> None:
    drawn = list(Batches(OF, 4, seed=3, count=21))
    assert [{turn.epoch for turn in batch} for batch in drawn] == [{number // 7} for number in range(21)]
    made = [[turn.place for turn in batch] for batch in drawn]
    assert len(made) == 21
    assert all(len(batch) == 4 for batch in made)
    assert all(len({OF[index] for index in batch}) == 1 for batch in made)
    epochs = [made[at : at + 7] for at in (0, 7, 14)]
    for epoch in epochs:
        counts = Counter(index for batch in epoch for index in batch)
        assert set(counts) == set(range(len(OF)))
        assert sum(counts[index] for index in range(len(OF)) if OF[index] == 0) == 20
        assert counts[13] == 4
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({OF[epoch[-1][0].place] for epoch in (list(Batches(OF, 4, seed, 7)) for seed in range(20))}) > 1


def test_a_batch_depends_on_its_number_alone() -> None:
    whole = list(Batches(OF, 4, seed=3, count=21))
    for start in range(21):
        assert list(Batches(OF, 4, seed=3, start=start, count=21 - start)) == whole[start:]
    again = Batches(OF, 4, seed=3, count=5, start=2)
    assert list(again) == list(again) == whole[2:7]
    assert (len(again), again.batch_size, again.drop_last) == (5, 4, True)
    assert list(Batches(OF, 4, seed=4, count=21)) != whole
    assert list(Batches(OF, 4, seed=-1, count=2))


def test_accelerate_deals_whole_batches_to_two_processes() -> None:
    whole = list(Batches(OF, 4, seed=3, count=20))
    for process in range(2):
        dealt = BatchSamplerShard(Batches(OF, 4, seed=3, count=20), 2, process)
        assert list(dealt) == whole[process::2]
        assert len(dealt) == 10
