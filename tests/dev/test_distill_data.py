"""Pictures with captions into a data cache for distillation: real small files of each kind, whole and broken."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from koala_sdxl.distill import build_cache, cache, sources
from koala_sdxl.distill.buckets import Batches, buckets, fit, nearest
from koala_sdxl.distill.config import DataTable
from koala_sdxl.distill.errors import UserError
from koala_sdxl.koala.files import atomic_write as disk

IDENTITY = {"teacher.model": "sdxl"}
datasets.disable_progress_bars()


def picture(width: int = 64, height: int = 64, colour: Any = (200, 40, 40), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)


def noise(width: int = 64, height: int = 64) -> Image.Image:
    """One that compresses badly, so that a cut is a loss."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def table(path: Path, **settings: Any) -> DataTable:
    """A configuration for small pictures."""
    given = {"path": path, "cache": path.parent / "cache", "resolution": 64, "bucket_step": 16}
    return DataTable.model_validate(given | settings)


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def shard(path: Path, files: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            raw = content.encode() if isinstance(content, str) else content
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def read(data: DataTable) -> tuple[dict[str, str], list[str]]:
    """Captions by key, in order, and the lines reported."""
    lines: list[str] = []
    samples = list(sources.read(data, lines.append))
    assert all(sample.image.mode == "RGB" for sample in samples)
    return {sample.key: sample.caption for sample in samples}, lines


def refused(data: DataTable) -> str:
    with pytest.raises(UserError) as problem:
        read(data)
    return str(problem.value)


# --- a folder ----------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_with_captions_of_both_kinds(tmp_path: Path) -> None:
    lines = [{"file_name": "d.jpeg", "title": "of d"}, {"file_name": "e.bmp", "text": "of e"}]
    files: dict[str, bytes | str] = {
        "b/c.WEBP": encoded(picture(), "WEBP"),
        "b/c.txt": "\ufeff  of c \n",
        "b/d.jpeg": encoded(picture(), "JPEG"),
        "b/e.bmp": encoded(picture(), "BMP"),
        "b/metadata.jsonl": "\n".join(map(json.dumps, lines)),
        "a.png": encoded(picture()),
        "a.txt": "of a, größer",
        "notes.md": "no picture",
    }
    found, reported = read(table(write(tmp_path / "data", files), caption="title"))
    assert list(found.items()) == [
        ("a.png", "of a, größer"),
        ("b/c.WEBP", "of c"),
        ("b/d.jpeg", "of d"),
        ("b/e.bmp", "of e"),
    ]
    assert reported == []


def test_each_broken_picture_is_reported_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some library leaves it
    files: dict[str, bytes | str] = {
        "a cut.png": encoded(noise())[:-3000],
        "b cut.jpg": encoded(noise(), "JPEG")[:-1000],
        "c cut.webp": encoded(noise(), "WEBP")[:-1000],
        "d cut.bmp": encoded(noise(), "BMP")[:-1000],
        "e empty.jpg": b"",
        "f page.png": "<!DOCTYPE html>",
        "g alone.png": encoded(picture()),
        "h blank.png": encoded(picture()),
        "i binary.png": encoded(picture()),
        "z good.png": encoded(picture()),
    }
    captions = {f"{name.rsplit('.', 1)[0]}.txt": "caption" for name in files if name != "g alone.png"}
    captions |= {"h blank.txt": " \n"}
    folder = write(tmp_path / "data", files | captions | {"metadata.jsonl": '{"file_name": "x.png"}\nno json\n'})
    (folder / "i binary.txt").write_bytes(b"\xff\xfe\x00")
    found, reported = read(table(folder))
    assert list(found) == ["z good.png"]
    assert [line.split(":")[0] for line in reported] == [
        *(name for name in files if name < "g"),
        "metadata.jsonl, line 2",
        "g alone.png",
        "h blank.png",
        "i binary.png",
    ]
    assert all(line.endswith("; skipped") for line in reported)
    said = "\n".join(reported)
    assert "a cut.png: the image cannot be decoded (image file is truncated" in said
    assert "e empty.jpg: the file is empty" in said
    assert "f page.png: this is not an image" in said
    assert "there is no caption, neither in g alone.txt nor in metadata.jsonl" in said
    assert "h blank.txt is missing or empty" in said
    assert "i binary.txt is not UTF-8 text" in said


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (picture(mode="RGBA", colour=(255, 0, 0, 0)), (255, 255, 255)),
        (picture(mode="RGBA", colour=(255, 0, 0, 128)), (255, 127, 127)),
        (picture(mode="LA", colour=(0, 0)), (255, 255, 255)),
        (picture(mode="L", colour=77), (77, 77, 77)),
        (picture(mode="1", colour=1), (255, 255, 255)),
        (picture().convert("P", palette=Image.Palette.ADAPTIVE), (200, 40, 40)),
        (Image.fromarray(np.full((64, 64), 77 * 257, np.uint16)), (77, 77, 77)),
    ],
    ids=["transparent", "half", "grey with alpha", "grey", "one bit", "palette", "16 bits"],
)
def test_every_kind_of_pixel_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    found = sources.decode(encoded(image))
    assert (found.mode, found.size) == ("RGB", (64, 64))
    assert np.abs(np.array(found.getpixel((32, 32))) - expected).max() <= 1


def test_cmyk_becomes_rgb() -> None:
    found = sources.decode(encoded(picture(mode="CMYK", colour=(0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.array(found.getpixel((32, 32))) - (255, 0, 0)).max() <= 8


def test_a_palette_with_a_transparent_colour_is_put_on_white() -> None:
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    found = sources.decode(encoded(image, transparency=image.getpixel((0, 0))))
    assert found.getpixel((32, 32)) == (255, 255, 255)


def test_a_picture_is_turned_as_its_exif_says() -> None:
    image = picture(40, 20, (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    found = sources.decode(encoded(image, exif=exif))
    assert found.size == (20, 40)
    assert (found.getpixel((10, 5)), found.getpixel((10, 35))) == ((255, 255, 255), (0, 0, 0))


def test_a_folder_that_gives_nothing_is_a_problem(tmp_path: Path) -> None:
    assert "nowhere does not exist; expected a folder with images" in refused(table(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    assert "file is a file; expected a folder with images" in refused(table(tmp_path / "file"))
    write(tmp_path / "texts", {"a.txt": "caption"})
    assert "texts contains no images" in refused(table(tmp_path / "texts"))
    write(tmp_path / "alone", {"a.png": encoded(picture()), "b.png": b""})
    said = refused(table(tmp_path / "alone"))
    assert "no usable image with a caption: 2 entries were skipped (first: a.png: there is" in said
    assert len(said.splitlines()) == 1


# --- WebDataset --------------------------------------------------------------------------------------------------

THREE: dict[str, bytes | str] = {
    "a.png": encoded(noise()),
    "a.txt": "of a",
    "b.PNG": encoded(noise()),
    "b.json": json.dumps({"caption": "of b"}),
    "c.png": encoded(noise()),
    "c.txt": "of c",
}
CAPTIONS = {"a.png": "of a", "b.png": "of b", "c.png": "of c"}


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    for name in ("1.tar", "0.tar"):
        shard(tmp_path / "data" / name, THREE)
    write(tmp_path / "data", {"notes.txt": ""})
    everything = [(f"{name}/{key}", caption) for name in ("0.tar", "1.tar") for key, caption in CAPTIONS.items()]
    for path in (tmp_path / "data", tmp_path / "data" / "{0..1}.tar"):
        found, reported = read(table(path, kind="webdataset"))
        assert (list(found.items()), reported) == (everything, [])
    found, reported = read(table(tmp_path / "data" / "1.tar", kind="webdataset"))
    assert (list(found.items()), reported) == (everything[3:], [])


def test_each_broken_member_is_reported_and_skipped(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "cut.png": encoded(noise())[:-3000],
        "cut.txt": "caption",
        "alone.png": encoded(picture()),
        "words.txt": "caption",
        "number.png": encoded(picture()),
        "number.json": '{"caption": 7}',
        "other.png": encoded(picture()),
        "other.json": '{"title": "caption"}',
        "list.png": encoded(picture()),
        "list.json": "[]",
        "broken.png": encoded(picture()),
        "broken.json": "{",
    }
    path = shard(tmp_path / "0.tar", files | THREE)
    found, reported = read(table(path, kind="webdataset"))
    assert list(found.values()) == list(CAPTIONS.values())
    said = [
        "0.tar/cut.png: the image cannot be decoded (image file is truncated",
        "0.tar/alone.png: there is no caption, neither .txt nor .json",
        "0.tar/words: there is no image, only .txt; expected one of .png",
        "0.tar/number.png: the caption (caption in its .json) is int, not text",
        "0.tar/other.png: there is no caption (caption in its .json is missing or empty)",
        "0.tar/list.png: its .json is not a JSON object",
        "0.tar/broken.png: its .json cannot be read (Expecting property name",
    ]
    assert all(line.startswith(start) for line, start in zip(reported, said, strict=True))


def test_a_damaged_shard_is_named_and_what_comes_before_the_damage_is_kept(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", THREE).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        where = {member.name: member for member in archive}
    data = tmp_path / "data"
    files: dict[str, bytes | str] = {
        "0.tar": whole[: where["c.png"].offset_data + 700],  # in a picture
        "1.tar": whole[: where["b.json"].offset_data + 3],  # in a caption, which must not be taken for a whole one
        "2.tar": whole[: where["c.png"].offset],  # between two samples, which reads like an end
        "3.tar": "<!DOCTYPE html>",
        "4.tar": "",
        # 5.tar is missing
        "6.tar": whole[: where["b.PNG"].offset] + b"\x01" * 512 + whole[where["b.PNG"].offset + 512 :],
        "7.tar": whole,
    }
    write(data, files)
    found, reported = read(table(data / "{0..7}.tar", kind="webdataset"))
    kept = {"0.tar": "ab", "1.tar": "a", "2.tar": "ab", "6.tar": "a", "7.tar": "abc"}
    assert list(found) == [f"{name}/{key}.png" for name in kept for key in kept[name]]
    assert reported.pop(2) == "1.tar/b.png: there is no caption, neither .txt nor .json; skipped"
    assert [line.split(":")[0] for line in reported] == [f"{number}.tar" for number in range(7)]
    said = dict(line.split(": ", 1) for line in reported)
    assert said["0.tar"] == "the shard is damaged (unexpected end of data); the rest is skipped"
    assert said["2.tar"] == said["6.tar"] == "the shard is damaged (it has no end marker); the rest is skipped"
    assert said["3.tar"].startswith("the shard is damaged (")
    assert said["5.tar"] == "the shard cannot be read (No such file or directory); skipped"


def test_a_compressed_shard_is_read_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz") as archive:
        archive.add(write(tmp_path / "files", THREE) / "a.png", "a.png")
        archive.add(tmp_path / "files" / "a.txt", "a.txt")
    assert read(table(tmp_path / "0.tar.gz", kind="webdataset")) == ({"0.tar.gz/a.png": "of a"}, [])


def test_shards_that_give_nothing_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "0.tar does not exist; expected a folder with .tar files" in refused(
        table(tmp_path / "0.tar", kind="webdataset")
    )
    assert "empty contains no .tar files" in refused(table(tmp_path / "empty", kind="webdataset"))
    assert "unbalanced braces" in refused(table(tmp_path / "{0..1.tar", kind="webdataset"))
    said = refused(table(tmp_path / "{0..1}.tar", kind="webdataset"))
    assert "no usable image with a caption: 2 entries were skipped (first: 0.tar: the shard" in said


# --- Hugging Face ------------------------------------------------------------------------------------------------


def saved(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    datasets.Dataset.from_dict(dict(columns)).save_to_disk(str(path))
    return path


def test_a_dataset_is_read_with_what_is_broken_reported(tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(encoded(picture(32, 32)))
    images = [
        {"bytes": encoded(picture(20, 10)), "path": None},
        {"bytes": encoded(noise())[:-3000], "path": "name.png"},
        None,
        {"bytes": encoded(picture()), "path": None},
        {"bytes": None, "path": str(tmp_path / "file.png")},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
    ]
    columns: dict[str, list[Any]] = {
        "photo": images,
        "words": ["one", "two", "three", None, " five ", "six"],
        "more": [0] * 6,
    }
    path = saved(tmp_path / "data", columns)
    found, reported = read(table(path, kind="huggingface", image="photo", caption="words"))
    assert found == {"data, row 0": "one", "data, row 4": "five"}
    said = [
        "data, row 1: the image cannot be decoded (image file is truncated",
        "data, row 2: there is no image in column photo; skipped",
        "data, row 3: there is no caption (column words is missing or empty); skipped",
        f"data, row 5: {tmp_path / 'gone.png'} cannot be read (No such file or directory); skipped",
    ]
    assert all(line.startswith(start) for line, start in zip(reported, said, strict=True))


def test_other_columns_of_pictures_are_read_too(tmp_path: Path) -> None:
    content = encoded(picture())
    pil = saved(tmp_path / "pil", {"image": [picture()], "caption": ["of it"]})
    raw = saved(tmp_path / "raw", {"image": [content], "caption": ["of it"]})
    both = saved(tmp_path / "both", {"image": [{"bytes": content, "path": "x.png"}], "caption": ["of it"]})
    for path in (pil, raw, both):
        assert read(table(path, kind="huggingface")) == ({f"{path.name}, row 0": "of it"}, [])


def test_what_is_no_such_dataset_is_a_problem(tmp_path: Path) -> None:
    data = saved(tmp_path / "data", {"image": [encoded(picture())], "caption": ["of it"], "length": [5]})
    assert "nowhere does not exist" in refused(table(tmp_path / "nowhere", kind="huggingface"))
    (tmp_path / "empty").mkdir()
    assert "empty is not a readable Hugging Face dataset" in refused(table(tmp_path / "empty", kind="huggingface"))
    said = refused(table(data, kind="huggingface", caption="text"))
    assert "data has no column 'text'; it has image, caption, length. Set data.caption" in said
    assert "has no column 'picture'" in refused(table(data, kind="huggingface", image="picture"))
    assert "'length' of" in refused(table(data, kind="huggingface", image="length"))
    both = datasets.DatasetDict({"train": datasets.load_from_disk(str(data))})
    both.save_to_disk(str(tmp_path / "splits"))
    assert "splits holds several datasets (train)" in refused(table(tmp_path / "splits", kind="huggingface"))
    assert read(table(tmp_path / "splits" / "train", kind="huggingface"))[1] == []
    (next(data.glob("*.arrow"))).write_bytes(b"ARROW1 no more")
    assert "data is not a readable Hugging Face dataset" in refused(table(data, kind="huggingface"))


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
    made = list(Batches(OF, 4, seed=3, count=21))
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
    assert len({OF[epoch[-1][0]] for epoch in (list(Batches(OF, 4, seed, 7)) for seed in range(20))}) > 1


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


# --- the cache ---------------------------------------------------------------------------------------------------


class Averages:
    """An encoder that averages over cells, and counts its calls."""

    def __init__(self, fail_after: int = 10**9, spoil: Callable[[torch.Tensor], None] | None = None) -> None:
        self.pictures = 0
        self.captions: list[str] = []
        self.fail_after = fail_after
        self.spoil = spoil

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        self.pictures += len(pictures)
        if self.pictures > self.fail_after:
            raise RuntimeError("out of memory")
        cells = torch.nn.functional.avg_pool2d(pictures, 8)
        found = torch.cat([cells, cells.mean(1, keepdim=True)], 1)
        if self.spoil:
            self.spoil(found)
        return found

    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self.captions += captions
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return lengths[:, None, None].expand(-1, 77, 6), lengths[:, None].expand(-1, 5) / 2


def folder_of(path: Path, sizes: Sequence[tuple[int, int]], captions: Sequence[str]) -> Path:
    files: dict[str, bytes | str] = {}
    for number, (size, caption) in enumerate(zip(sizes, captions, strict=True)):
        files |= {f"{number:03}.png": encoded(picture(*size, (number, 0, 0))), f"{number:03}.txt": caption}
    return write(path, files)


def built(
    data: DataTable, encoder: build_cache.Encoder | None, **identity: str
) -> tuple[cache.Cache, list[str], list[str]]:
    said: list[str] = []
    reported: list[str] = []
    return build_cache.build(data, encoder, IDENTITY | identity, said.append, reported.append), said, reported


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
    assert said[-1] == f"{data.cache}: 13 images cached, 2 skipped."
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


def test_a_loader_with_workers_gives_batches_of_one_size(data: DataTable) -> None:
    found = built(data, Averages())[0]
    assert found[0]["ids"][0] == 100  # a shard is open in this process
    assert torch.equal(pickle.loads(pickle.dumps(found))[12]["latents"], found[12]["latents"])
    batches = Batches(found.bucket_of, 2, seed=0, count=7)
    loader = DataLoader(found, batch_sampler=batches, num_workers=1)
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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_build_leaves_nothing_and_can_be_repeated(data: DataTable, error: type[BaseException]) -> None:
    encoder = Averages()

    def fail(_: torch.Tensor) -> None:
        if encoder.pictures > 6:
            raise error

    encoder.spoil = fail
    with pytest.raises(error):
        built(data, encoder)
    assert names(data.cache.parent) == ["data"]
    assert len(built(data, Averages())[0]) == 13


def test_what_a_killed_build_left_is_deleted(data: DataTable) -> None:
    left = data.cache.with_name("cache.building")
    write(left, {"latents-00000-64x64.safetensors": b"", "latents-00001-64x64.safetensors.0f.partial": b""})
    data.cache.mkdir()  # empty, as somebody may have made it
    assert len(built(data, Averages())[0]) == 13
    assert names(data.cache.parent) == ["cache", "data"]


def test_nobody_elses_files_are_deleted(data: DataTable) -> None:
    write(data.cache, {"mine.txt": "mine"})
    with pytest.raises(UserError, match=r"a folder with other files and no index\.json"):
        built(data, Averages())
    assert names(data.cache) == ["mine.txt"]
    left = write(data.cache.with_name("other.building"), {"mine.txt": "mine", "latents-0.safetensors": ""})
    with pytest.raises(UserError, match=r"other\.building cannot be made"):
        built(data.model_copy(update={"cache": data.cache.with_name("other")}), Averages())
    assert names(left) == ["mine.txt"]


def test_a_full_disk_is_a_problem_and_leaves_nothing(data: DataTable, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors = disk.write_safetensors

    def until_full(path: Path, *rest: Any) -> None:
        write_safetensors(path, *rest)
        if "00002" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write_safetensors", until_full)
    with pytest.raises(UserError, match=r"^the data cache is not finished: no space left for latents-00002") as problem:
        built(data, Averages())
    assert "Free space there and run again" in str(problem.value)
    assert names(data.cache.parent) == ["data"]


def test_a_damaged_cache_is_named(data: DataTable) -> None:
    found = built(data, Averages())[0]
    path = data.cache / found.index.shards[1].file
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"latents-00001-64x64\.safetensors is damaged .*Delete the folder "):
        found[5]
    assert found[0]["ids"][0] == 100
    with pytest.raises(UserError, match=r"latents-00001-64x64\.safetensors is damaged"):
        built(data, None)
    path.unlink()
    with pytest.raises(UserError, match=r"latents-00001-64x64\.safetensors is damaged \(No such file"):
        built(data, None)
    path.write_bytes((data.cache / found.index.shards[3].file).read_bytes())
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
    with pytest.raises(UserError, match=r"no image of .* can be cached: 15 were skipped \(first: 000\.png: 100 x"):
        built(data.model_copy(update={"resolution": 1024}), Averages())
    assert names(data.cache.parent) == ["data"]
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
