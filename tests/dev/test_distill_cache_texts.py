"""Captions in the cache, and which images are in it: several captions an image, tokens, filters by size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from koala_sdxl.distill import cache
from koala_sdxl.distill.buckets import Batches
from koala_sdxl.distill.config import DataTable
from koala_sdxl.distill.errors import UserError
from tests.dev.distill_pictures import IDENTITY, Averages, built, folder_of, table


@pytest.fixture
def many(tmp_path: Path) -> DataTable:
    """Five squares and a wide picture with one to three captions each, of lengths that tell them apart."""
    captions = [[f"{'x' * (10 * number + each)}" for each in range(1 + number % 3)] for number in range(1, 7)]
    sizes = [(64, 64)] * 5 + [(128, 64)]
    return table(folder_of(tmp_path / "many", sizes, ["\n".join(lines) for lines in captions]), caption_lines=True)


def lengths(samples: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    """The captions of samples, by their lengths."""
    return [round(float(sample["context"].mean())) for sample in samples]


def test_all_captions_are_cached_and_the_first_is_the_default(many: DataTable) -> None:
    found, said, _ = built(many, encoder := Averages())
    assert said[-1] == f"{many.cache}: 6 images cached, 0 skipped."
    assert (found.index.samples, found.index.captions) == (6, len(encoder.captions)) == (6, 12)
    assert lengths(found[number] for number in range(6)) == [10, 20, 30, 40, 50, 60]
    assert [found.captions(number) for number in range(6)] == [2, 3, 1, 2, 3, 1]
    assert lengths(found.sample(4, caption) for caption in range(3)) == [50, 51, 52]
    (many.path / "002.txt").unlink()  # images cached after it are counted on from the right captions
    found = built(many, None if cache.ready(many, IDENTITY) else Averages())[0]
    assert lengths(found.sample(number, found.captions(number) - 1) for number in range(5)) == [11, 22, 41, 52, 60]


def test_each_epoch_shows_every_picture_with_another_caption(many: DataTable) -> None:
    found = built(many, Averages())[0]
    learned = cache.Learned(found, [5, 1, 4], seed=3)
    batches = Batches([found.bucket_of[index] for index in learned.indices], 2, seed=3, count=12)
    seen: dict[int, list[int]] = defaultdict(list)
    for batch in batches:  # of each epoch one with both squares, and one with the wide picture twice
        for turn in batch[: 1 if batch[0].place == batch[1].place else 2]:
            seen[turn.place] += lengths([learned[turn]])
    assert seen[0] == [60] * 6
    for number, first in ((1, 20), (2, 50)):
        for round_of_all in (seen[number][:3], seen[number][3:]):
            assert sorted(round_of_all) == [first, first + 1, first + 2]
    stopped = DataLoader(learned, batch_sampler=replace(batches, start=5, count=7), num_workers=1)
    whole = list(DataLoader(learned, batch_sampler=batches))
    for batch, wanted in zip(stopped, whole[5:], strict=True):
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    orders = {tuple(cache.caption_of(0, number, epoch, 3) for epoch in range(3)) for number in range(60)}
    assert len(orders) == 6
    assert [cache.caption_of(seed, 1, 0, 3) for seed in range(9)] != [cache.caption_of(0, 1, 0, 3)] * 9


def test_tokens_are_cached_in_place_of_embeddings(many: DataTable) -> None:
    found = built(many.model_copy(update={"texts": "tokens"}), encoder := Averages())[0]
    assert encoder.captions == []
    sample = found.sample(4, 2)
    assert sorted(sample) == ["ids", "latents", "tokens"]
    assert torch.equal(sample["tokens"], encoder.tokens(["x" * 52])[0])
    assert found.index.longest_caption == 3
    with pytest.raises(UserError, match=r"was computed with data\.texts = 'tokens' \(here 'embeddings'\)"):
        built(many, Averages())


def test_pictures_of_unwanted_sizes_are_left_out_named_and_counted(tmp_path: Path) -> None:
    sizes = [(80, 80), (79, 200), (200, 80), (201, 80), (160, 160), (80, 201)]
    data = table(folder_of(tmp_path / "data", sizes, ["a"] * 6), min_side=80, max_image_aspect=2.5, max_aspect=4.0)
    found, said, reported = built(data, Averages())
    assert reported == [
        "001.png: 79 x 200 has a side below data.min_side = 80; skipped",
        "003.png: 201 x 80 is above data.max_image_aspect = 2.5; skipped",
        "005.png: 80 x 201 is above data.max_image_aspect = 2.5; skipped",
    ]
    assert said[-1].endswith(": 3 images cached, 3 skipped (2 above data.max_image_aspect, 1 below data.min_side).")
    assert found.index.left_out == {"above data.max_image_aspect": 2, "below data.min_side": 1}
    assert sorted(tuple(found[number]["ids"][:2].tolist()) for number in range(3)) == [(80, 80), (80, 200), (160, 160)]
    with pytest.raises(UserError, match=r"was computed with data\.min_side = 80 \(here 0\)"):
        built(data.model_copy(update={"min_side": 0}), None)
