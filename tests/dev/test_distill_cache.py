"""Pictures with captions into a data cache for distillation."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from koala_sdxl.distill import build_cache, cache
from koala_sdxl.distill.buckets import Batches
from koala_sdxl.distill.config import DataTable
from koala_sdxl.distill.entries import Part
from koala_sdxl.distill.errors import UserError
from koala_sdxl.koala.files import atomic_write as disk
from tests.dev.distill_pictures import IDENTITY, Averages, built, encoded, folder_of, noise, picture, table, write
from tools.harness.testhost import ROOT


@pytest.fixture
def data(tmp_path: Path) -> DataTable:
    """Eleven squares, ten of them with the same caption, and two wide pictures; one is too small, one broken."""
    sizes = [(100, 100)] * 10 + [(200, 100)] * 2 + [(64, 64), (63, 64), (64, 64)]
    captions = ["a koala"] * 10 + ["wide", "wider", "as it is", "small", "broken"]
    folder = folder_of(tmp_path / "data", sizes, captions)
    (folder / "014.png").write_bytes(b"")
    return table(folder)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "PER_SHARD", 4)
    monkeypatch.setattr(build_cache, "AT_ONCE", 3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_cache_is_built_once(data: DataTable) -> None:
    encoder = Averages()
    assert cache.ready(data, IDENTITY) is None
    first, said, reported = built(data, encoder)
    assert encoder.pictures == 13
    assert sorted(encoder.captions) == ["a koala", "as it is", "wide", "wider"]
    assert said[-1] == f"{data.cache}: 13 images cached, 2 skipped (1 smaller than their bucket, 1 unusable)."
    assert reported == [
        "013.png: 63 x 64 is smaller than its bucket, 64 x 64; skipped",
        "014.png: the file is empty; skipped",
    ]
    index = json.loads((data.cache / "index.json").read_text())
    assert (index["samples"], index["skipped"], index["problems"]) == (13, 2, reported)
    assert [(one["bucket"], one["count"]) for one in index["shards"]] == [
        ([64, 64], 4),
        ([64, 64], 4),
        ([64, 64], 3),
        ([80, 48], 2),
    ]
    assert index["identity"]["teacher.model"] == "sdxl"
    assert names(data.cache) == sorted(["index.json", *(one["file"] for one in index["shards"])])
    assert names(data.cache.parent) == ["cache", "data"]
    second, said, reported = built(data, None)
    assert (said, reported) == ([f"{data.cache}: 13 images, cached earlier."], [])
    assert second.index == first.index
    found = cache.ready(data, IDENTITY)
    assert found is not None
    assert len(found) == 13


def test_samples_come_back_as_they_were_encoded(data: DataTable) -> None:
    found = built(data, Averages())[0]
    assert len(found) == 13
    for number, colour in enumerate([*range(10), 12, 10, 11]):
        sample = found[number]
        assert {value.dtype for value in sample.values()} == {torch.float32}
        wide = colour in (10, 11)
        assert sample["latents"].shape == (4, *((6, 10) if wide else (8, 8)))
        assert sample["latents"][0] == pytest.approx(colour / 127.5 - 1, abs=1e-3)
        length = {10: 4.0, 11: 5.0, 12: 8.0}.get(colour, 7.0)
        assert torch.equal(sample["context"], torch.full((77, 6), length))
        assert torch.equal(sample["pooled"], torch.full((5,), length / 2))
    assert found[0]["ids"].tolist() == [100, 100, 0, 0, 64, 64]
    assert found[10]["ids"].tolist() == [64, 64, 0, 0, 64, 64]
    assert found[11]["ids"].tolist() == [100, 200, 0, 8, 48, 80]  # 96 x 48, less 8 on the left and right
    assert Counter(found.bucket_of) == {0: 11, 1: 2}
    assert len(set(found.bucket_of[:11])) == 1
    with pytest.raises(IndexError):
        found[13]


def test_no_more_shards_stay_open_than_a_process_may_have(data: DataTable, monkeypatch: pytest.MonkeyPatch) -> None:
    found, again = built(data, Averages())[0], built(data, None)[0]
    monkeypatch.setattr(cache, "OPEN", 2)
    for number in (0, 5, 10, 12, 0, 11, 5):
        assert torch.equal(again[number]["latents"], found[number]["latents"])
        assert len(again._opened) <= 2


def test_a_loader_with_workers_gives_batches_of_one_size(data: DataTable) -> None:
    found = built(data, Averages())[0]
    assert found[0]["ids"][0] == 100  # a shard is open in this process
    assert torch.equal(pickle.loads(pickle.dumps(found))[12]["latents"], found[12]["latents"])
    batches = Batches(found.bucket_of, 2, seed=0, count=7)
    learned = cache.Learned(found, range(len(found)), seed=0)
    loader = DataLoader(learned, batch_sampler=batches, num_workers=1)
    shapes = Counter(tuple(batch["latents"].shape) for batch in loader)
    assert shapes == {(2, 4, 8, 8): 6, (2, 4, 6, 10): 1}


def test_small_pictures_are_enlarged_if_asked_for(data: DataTable) -> None:
    found, _, reported = built(data.model_copy(update={"upscale": True}), Averages())
    assert len(found) == 14
    assert reported == ["014.png: the file is empty; skipped"]
    assert [64.0, 63.0, 0.0, 0.0, 64.0, 64.0] in [found[number]["ids"].tolist() for number in range(14)]


def test_random_cuts_are_the_same_each_time(data: DataTable) -> None:
    anywhere = data.model_copy(update={"crop": "random"})
    first = built(anywhere, Averages())[0]
    second = built(anywhere.model_copy(update={"cache": data.cache.parent / "second"}), Averages())[0]
    cuts = [first[number]["ids"].tolist() for number in range(13)]
    assert cuts == [second[number]["ids"].tolist() for number in range(13)]
    assert any(cut[3] not in (0, 8) for cut in cuts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resolution": 128}, "data.resolution = 64 (here 128)"),
        ({"crop": "random"}, "data.crop = 'center' (here 'random')"),
        ({"path": Path("elsewhere")}, "data.path = "),
    ],
)
def test_a_cache_of_something_else_is_not_used(data: DataTable, change: dict[str, Any], said: str) -> None:
    built(data, Averages())
    before = names(data.cache)
    with pytest.raises(UserError) as problem:
        built(data.model_copy(update=change), Averages())
    assert f"was computed with {said}" in str(problem.value)
    assert "Choose another folder as data.cache, or delete this one." in str(problem.value)
    with pytest.raises(UserError, match=r"teacher\.model = 'sdxl' \(here 'other'\); expected"):
        built(data, Averages(), **{"teacher.model": "other"})
    assert names(data.cache) == before
    built(data.model_copy(update={"workers": 7, "caption_dropout": 0.5}), None)  # these change nothing in it


def shards(folder: Path) -> dict[str, tuple[int, bytes]]:
    """A cache's shards by name: when each was written, and its content."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("latents-*")}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_build_is_continued_to_the_cache_of_an_unbroken_one(
    data: DataTable, error: type[BaseException]
) -> None:
    encoder = Averages()

    def fail(_: torch.Tensor) -> None:
        if encoder.pictures > 6:
            raise error

    encoder.spoil = fail
    with pytest.raises(error):
        built(data, encoder)
    before = shards(data.cache)
    assert list(before) == ["latents-00000-64x64.safetensors"]
    assert cache.ready(data, IDENTITY) is None

    again = Averages()
    continued, said, _ = built(data, again)
    assert said[0] == f"{data.cache}: it is not complete; 4 images in it are kept, and what it lacks is computed."
    assert again.pictures == 9
    unbroken = built(data.model_copy(update={"cache": data.cache.with_name("unbroken")}), Averages())[0]
    assert before.items() <= shards(data.cache).items()
    assert {name: content for name, (_, content) in shards(data.cache).items()} == {
        name: content for name, (_, content) in shards(unbroken.folder).items()
    }
    assert continued.index == unbroken.index


def test_a_killed_build_is_continued(data: DataTable) -> None:
    """A process of its own, killed while it writes its second shard."""
    script = f"""
import os, signal
import tools
from koala_sdxl.distill import build_cache, config
from koala_sdxl.koala.files import atomic_write as disk
from tests.dev.distill_pictures import IDENTITY, Averages
build_cache.PER_SHARD, build_cache.AT_ONCE = 4, 3
write = disk.write_safetensors
def until_killed(path, *rest):
    write(path, *rest)
    if any(path.parent.parent.glob("latents-*")):
        os.kill(os.getpid(), signal.SIGKILL)
disk.write_safetensors = until_killed
data = config.DataTable.model_validate_json({data.model_dump_json()!r})
build_cache.build(data, Averages(), IDENTITY, print, print)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(data.cache.glob("koala-*.partial"))) == 1
    before = shards(data.cache)
    assert len(before) == 1
    assert len(built(data, Averages())[0]) == 13
    assert before.items() <= shards(data.cache).items()
    assert names(data.cache) == sorted(["index.json", *shards(data.cache)])


def test_what_has_changed_since_is_encoded_and_the_rest_kept(data: DataTable) -> None:
    built(data, Averages())
    before = shards(data.cache)
    (data.path / "003.txt").write_text("a koala that sleeps")
    write(data.path, {"900.png": encoded(picture(64, 64, (90, 0, 0))), "900.txt": "new"})
    (data.path / "010.png").unlink()
    touched = data.path / "000.png"
    os.utime(touched, ns=(1, 1))  # as one that was exchanged for another of the same size
    assert cache.ready(data, IDENTITY) is None
    encoder = Averages()
    found, said, _ = built(data, encoder)
    kept = "the images have changed since they were cached; 13 images in it are kept, and what it lacks is computed."
    assert said[0] == f"{data.cache}: {kept}"
    aside = "3 in it are of images that have changed or are gone, and are not used."
    assert said[-1].endswith(f": 13 images cached, 3 skipped (1 smaller than their bucket, 2 unusable). {aside}")
    assert sorted(encoder.captions) == ["a koala", "a koala that sleeps", "new"]
    assert before.items() <= shards(data.cache).items()
    samples = [found[number] for number in range(len(found))]
    colours = sorted(round(float((sample["latents"][0].mean() + 1) * 127.5)) for sample in samples)
    assert colours == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 90]
    assert [float(sample["pooled"][0]) for sample in samples].count(len("a koala that sleeps") / 2) == 1
    assert len(found.bucket_of) == 13
    assert built(data, None)[1] == [f"{data.cache}: 13 images, cached earlier."]


def test_a_cache_whose_pictures_are_gone_is_used_as_it_is(data: DataTable) -> None:
    built(data, Averages())
    shutil.rmtree(data.path)
    assert len(built(data, None)[0]) == 13


def test_several_processes_share_the_work(data: DataTable) -> None:
    plan = build_cache.begin(data, IDENTITY, print)
    encoders = [Averages() for _ in range(3)]
    outcomes = [
        build_cache.encode(data, encoder, plan, Part(number, 3), print, print)
        for number, encoder in enumerate(encoders)
    ]
    found = build_cache.finish(data, IDENTITY, plan, outcomes, print)
    assert (len(found), found.index.skipped) == (13, 2)
    assert [encoder.pictures for encoder in encoders] == [5, 4, 4]
    assert built(data, None)[0].index == found.index


def test_long_captions_and_poor_jpegs_are_counted(data: DataTable) -> None:
    assert built(data, Averages())[0].remarks() == []
    for name in ("000", "001"):
        (data.path / f"{name}.txt").write_text("word " * 80)
    for number in range(12):
        (data.path / f"{number:03}.png").write_bytes(encoded(noise(), "JPEG", quality=75))
    assert built(data, Averages())[0].remarks() == [
        "2 of 13 captions have more than 77 tokens, the longest 82: the text encoders read the first 77, start and end "
        "included.",
        "12 of 13 images are JPEGs of quality 75 or less: a tool may have compressed them again, as datasets.map does "
        "(distill/README.md, Data).",
    ]


def test_nobody_elses_files_are_deleted(data: DataTable) -> None:
    write(data.cache, {"mine.txt": "mine"})
    with pytest.raises(UserError, match=r"a folder with other files and no index\.json"):
        built(data, Averages())
    assert names(data.cache) == ["mine.txt"]


def test_a_full_disk_is_a_problem_and_leaves_what_is_finished(data: DataTable, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors, written = disk.write_safetensors, list[Path]()

    def until_full(path: Path, *rest: Any) -> None:
        write_safetensors(path, *rest)
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write_safetensors", until_full)
    with pytest.raises(UserError, match=r"^the data cache is not finished: no space left for latents-00002") as problem:
        built(data, Averages())
    assert "Free space there and run again" in str(problem.value)
    assert names(data.cache) == ["index.json", "latents-00000-64x64.safetensors", "latents-00001-64x64.safetensors"]
    assert len(built(data, Averages())[0]) == 13


def test_a_damaged_cache_is_named(data: DataTable) -> None:
    found = built(data, Averages())[0]
    path = data.cache / found.index.shards[1].file
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"latents-00001-64x64\.safetensors is damaged .*Delete this file "):
        found[5]
    assert found[0]["ids"][0] == 100
    with pytest.raises(UserError, match=r"latents-00001-64x64\.safetensors is damaged"):
        built(data, None)
    path.unlink()
    again = Averages()
    repaired = built(data, again)[0]
    assert (again.pictures, len(repaired)) == (4, 13)
    path = data.cache / repaired.index.shards[0].file
    path.write_bytes((data.cache / repaired.index.shards[2].file).read_bytes())
    with pytest.raises(UserError, match=r"is damaged \(2 samples, not 4\)"):
        built(data, None)
    (data.cache / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        built(data, None)


def test_what_the_encoder_spoils_is_skipped(data: DataTable) -> None:
    def overflow(latents: torch.Tensor) -> None:
        latents[0] = 1e6  # more than fp16 holds

    found, _, reported = built(data, Averages(spoil=overflow))
    assert len(found) == 13 - 5  # the first of each call
    assert reported[0] == "000.png: latents came out infinite or not a number; skipped"
    assert all(found[number]["latents"].isfinite().all() for number in range(len(found)))


def test_nothing_to_cache_is_a_problem(data: DataTable) -> None:
    skipped = r"15 skipped \(14 smaller than their bucket, 1 unusable; first: 000\.png: 100 x"
    with pytest.raises(UserError, match=f"no image of .* can be cached: {skipped}"):
        built(data.model_copy(update={"resolution": 1024}), Averages())
    shutil.rmtree(data.cache)
    with pytest.raises(UserError, match="nowhere does not exist"):
        built(data.model_copy(update={"path": data.path.parent / "nowhere"}), Averages())
    assert names(data.cache.parent) == ["data"]


def test_only_so_many_problems_are_listed_and_captions_kept(data: DataTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "LISTED", 1)
    monkeypatch.setattr(build_cache, "MEMO", 1)
    encoder = Averages()
    found = built(data, encoder)[0]
    assert (found.index.skipped, len(found.index.problems)) == (2, 1)
    assert sorted(encoder.captions) == ["a koala", "as it is", "wide", "wider"]
    assert [found[number]["pooled"][0].item() for number in (9, 10)] == [3.5, 4]
