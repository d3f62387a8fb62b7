"""Captions as tokens, embedded while training: what a cache of embeddings gives, from a fraction of its size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_sdxl.distill import config
from koala_sdxl.distill.teacher import Encoder, open_teacher
from koala_sdxl.distill.texts import TextEncoders
from tests.dev import distill_runs
from tests.dev.distill_pictures import tar
from tests.dev.distill_runs import ENVIRONMENT, SETTINGS, described, process, rows, run, same, saved

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)

CAPTIONS = ["a red circle", "", "größer ☃", "word " * 100]


@pytest.fixture(scope="module")
def encoder(place: Path) -> Encoder:
    """The teacher's."""
    return Encoder(open_teacher(config.read(described(place, "read", {})).teacher).pipeline(), torch.device("cpu"))


def test_captions_are_embedded_as_diffusers_embeds_them(encoder: Encoder) -> None:
    context, _, pooled, _ = encoder.pipeline.encode_prompt(
        prompt=CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert all(map(torch.equal, encoder.texts(CAPTIONS), (context, pooled)))
    assert encoder.lengths(CAPTIONS)[3] == 102


def test_tokens_of_a_batch_become_its_embeddings(encoder: Encoder) -> None:
    tokens = encoder.tokens(CAPTIONS)
    assert (tokens.shape, tokens.dtype) == ((4, 2, 77), torch.int64)
    batch = {"latents": torch.zeros(4), "tokens": tokens}
    found = TextEncoders.of(encoder.pipeline, torch.device("cpu")).embedded(batch)
    assert sorted(found) == ["context", "latents", "pooled"]
    assert all(map(torch.equal, (found["context"], found["pooled"]), encoder.texts(CAPTIONS)))


@pytest.fixture(scope="module")
def captioned(place: Path) -> Iterator[Path]:
    """Shards of the pictures, with their own caption and two others, one a line; a small one and a long one besides."""
    files: dict[str, bytes | str] = {}
    for path in sorted((place / "pictures").glob("*.png")):
        files[path.name] = path.read_bytes()
        files[f"{path.stem}.txt"] = f"{path.with_suffix('.txt').read_text()}a drawing\nnumber {path.stem}\n"
    for number in range(2):
        half = dict(list(files.items())[12 * number : 12 * number + 12])
        tar(place / "shards" / f"{number}.tar", half)
    yield place / "shards"
    shutil.rmtree(place / "shards")


TABLES: dict[str, dict[str, Any]] = {
    "data": {
        **SETTINGS["data"],
        "path": "shards",
        "kind": "webdataset",
        "caption_lines": True,
        "texts": "tokens",
        "cache": "tokens",
        "min_side": 64,
    },
    "training": {**SETTINGS["training"], "steps": 6, "checkpoint_every": 3, "ema": 0.9},
    "validation": {"images": 3, "every": 3},
}
"""Everything at once: shards, several captions a picture, tokens, a filter, held-out pictures."""


def numbers(folder: Path) -> list[float]:
    """All that a run measured."""
    held_out = (folder / "validation.csv").read_text().splitlines()[1:]
    return [float(value) for row in rows(folder) for value in row.values()] + [
        float(value) for line in held_out for value in line.split(",")
    ]


@pytest.fixture(scope="module")
def whole(place: Path, captioned: Path) -> Path:
    """The output folder of an unbroken run."""
    run(place, "whole", **TABLES)
    distill_runs.AcceleratorState._reset_state(reset_partial_state=True)
    return place / "whole"


@pytest.mark.nightly
def test_a_run_on_tokens_is_that_on_embeddings_within_rounding(place: Path, whole: Path) -> None:
    run(place, "embedded", **TABLES | {"data": TABLES["data"] | {"texts": "embeddings", "cache": "embeddings"}})
    assert numbers(place / "embedded") == pytest.approx(numbers(whole), rel=1e-3)
    assert numbers(place / "embedded") != numbers(whole)  # fp16 rounds the cached ones
    index = json.loads((place / "tokens" / "index.json").read_text())
    assert (index["samples"], index["captions"]) == (12, 36)


def test_a_stopped_run_goes_on_with_the_captions_it_would_have_drawn(place: Path, whole: Path) -> None:
    folder = place / "stopped"
    shutil.copytree(whole / "checkpoints" / "step-0000003", folder / "checkpoints" / "step-0000003")
    for file in ("config.json", "metrics.csv", "validation.csv"):
        shutil.copy(whole / file, folder / file)
    assert "resuming from step 3" in run(place, "stopped", **TABLES)
    assert numbers(folder) == numbers(whole)
    assert same(saved(folder), saved(whole))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("several_processes")
def test_two_processes_see_what_one_sees(place: Path, captioned: Path) -> None:
    """They fill a cache of their own, and one goes on from their checkpoint."""
    tables = TABLES | {"data": TABLES["data"] | {"cache": "of-two"}}
    launch = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tools.run", "koala_sdxl.distill")
    running = process(*launch, str(described(place, "two", tables)), env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"})
    complained = running.communicate()[1]
    assert running.returncode == 0, complained[-5000:]
    one, training = place / "one", {**TABLES["training"], "accumulate": 2}
    run(place, "one", **tables | {"training": training})
    assert numbers(one) == pytest.approx(numbers(place / "two"), rel=1e-3)
