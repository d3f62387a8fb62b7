"""Pictures with captions as the trainer reads them: real small files of each kind, whole and broken."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import ImageFile

from koala_sdxl.distill import sources
from koala_sdxl.distill.config import DataTable
from koala_sdxl.distill.errors import UserError
from tests.dev.distill_pictures import encoded, noise, picture, table, tar, write

datasets.disable_progress_bars()


def read(data: DataTable) -> tuple[dict[str, str], list[str]]:
    """The only caption by key, in order, and the lines reported."""
    lines: list[str] = []
    samples = list(sources.read(data, lines.append))
    assert all(sample.image.mode == "RGB" for sample in samples)
    return {sample.key: sample.captions[0] for sample in samples if len(sample.captions) == 1}, lines


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
    assert reported == ["not read: 1 .md, such as notes.md (no image that Pillow reads); skipped"]


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
    assert (
        "there is no caption, neither in g alone.txt or g alone.caption nor in metadata.jsonl, metadata.csv or " in said
    )
    assert "h blank.txt is missing or empty" in said
    assert "i binary.txt is not UTF-8 text" in said


# every format that this Pillow reads, and writes, so that there can be one
FORMATS = {
    "APNG": "PNG",
    "AVIF": "AVIF",
    "DDS": "DDS",
    "GIF": "GIF",
    "ICO": "ICO",
    "JFIF": "JPEG",
    "JP2": "JPEG2000",
    "PCX": "PCX",
    "PPM": "PPM",
    "QOI": "QOI",
    "TGA": "TGA",
    "TIF": "TIFF",
    "tiff": "TIFF",
}


def test_every_format_is_read_and_what_is_not_is_counted(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{name}.{name}": encoded(picture(), kind) for name, kind in FORMATS.items()}
    files |= {f"{name}.caption": f"of {name}" for name in FORMATS}
    files |= {"GIF.txt": "before .caption", "a/x.heic": "", "b.heic": "", "b.txt": "of what is not read", ".hidden": ""}
    found, reported = read(table(write(tmp_path / "data", files)))
    assert found == {f"{name}.{name}": f"of {name}" for name in FORMATS} | {"GIF.GIF": "before .caption"}
    assert reported == [
        "not read: 2 .heic, such as a/x.heic (no image that Pillow reads); skipped",
        "not read: 1 .txt, such as b.txt (the caption of no image); skipped",
    ]
    members = {key: files[key] for key in sorted(files) if not key.startswith((".", "a/", "b."))}
    found, reported = read(table(tar(tmp_path / "0.tar", members), kind="webdataset"))
    assert (len(found), reported) == (len(FORMATS), [])


METADATA = {
    "jsonl": '{"file_name": "./a.png", "text": "of a"}\n{"file_name": "below/deep/b.png", "text": "of b"}\n',
    "csv": "file_name,text\n./a.png,of a\nbelow/deep/b.png,of b\n",
}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_is_read_as_imagefolder_reads_it(tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "data", {"a.png": encoded(picture()), "below/deep/b.png": encoded(picture())})
    if kind == "parquet":
        rows = datasets.Dataset.from_dict({"file_name": ["./a.png", "below/deep/b.png"], "text": ["of a", "of b"]})
        rows.to_parquet(data / "metadata.parquet")
    else:
        (data / f"metadata.{kind}").write_text(METADATA[kind])
    theirs = datasets.load_dataset("imagefolder", data_dir=str(data), split="train", cache_dir=str(tmp_path / "hf"))
    assert theirs["text"][:] == ["of a", "of b"]
    assert read(table(data)) == ({"a.png": "of a", "below/deep/b.png": "of b"}, [])
    (data / "below" / "metadata.jsonl").write_text('{"file_name": "deep/b.png", "text": "nearer"}')
    assert read(table(data))[0] == {"a.png": "of a", "below/deep/b.png": "nearer"}


@pytest.mark.parametrize(
    ("changed", "quality"),
    [
        (lambda data: data, 95),
        (lambda data: data.map(lambda row: {"image": row["image"]}), 75),
        (lambda data: data.map(lambda row: {"caption": str(row["image"].size)}), 75),
        (lambda data: data.map(lambda caption: {"caption": f"{caption}!"}, input_columns=["caption"]), 95),
        (lambda data: data.cast_column("image", datasets.Image(decode=False)).map(lambda row: row), 95),
    ],
    ids=["as it was", "returned", "read", "other columns", "not decoded"],
)
def test_what_the_guide_says_of_map_is_so(
    tmp_path: Path, changed: Callable[[datasets.Dataset], datasets.Dataset], quality: int
) -> None:
    images_of = [{"bytes": encoded(noise(), "JPEG", quality=95), "path": None}]
    data = datasets.Dataset.from_dict({"image": images_of, "caption": ["of it"]})
    changed(data.cast_column("image", datasets.Image())).save_to_disk(str(tmp_path / "data"))
    (sample,) = sources.read(table(tmp_path / "data", kind="huggingface"), print)
    assert sample.jpeg == quality


MANY = ["of it", "of this, größer"]


def captions(data: DataTable) -> tuple[list[list[str]], list[str]]:
    """All captions of each picture, and the lines reported."""
    lines: list[str] = []
    return [list(sample.captions) for sample in sources.read(data, lines.append)], lines


def test_a_picture_may_have_several_captions(tmp_path: Path) -> None:
    image = encoded(picture())
    lines: dict[str, bytes | str] = {
        "a.png": image,
        "a.txt": "\ufeff of it \r\n\n of this, größer\n",
        "b.png": image,
        "b.caption": "\n \n",
    }
    folder = write(tmp_path / "lines", lines)
    assert captions(table(folder, caption_lines=True)) == (
        [MANY],
        ["b.png: there is no caption (b.caption is missing or empty); skipped"],
    )
    assert captions(table(folder))[0] == [["of it \r\n\n of this, größer"]]
    rows: list[dict[str, Any]] = [
        {"file_name": "a.png", "text": MANY},
        {"file_name": "b.png", "text": ["", None, "one"]},
    ]
    rows += [{"file_name": "c.png", "text": ["two", 2]}, {"file_name": "d.png", "text": []}]
    table_of: dict[str, bytes | str] = {
        "metadata.jsonl": "\n".join(map(json.dumps, rows)),
        **{f"{name}.png": image for name in "abcd"},
    }
    assert captions(table(write(tmp_path / "lists", table_of))) == (
        [MANY, ["one"]],
        [
            "c.png: the caption (caption in metadata.jsonl) is int, not text; skipped",
            "d.png: there is no caption (caption in metadata.jsonl is missing or empty); skipped",
        ],
    )
    both: dict[str, bytes | str] = {
        "metadata.csv": 'file_name,short,long\na.png,of it,"of this, größer"\nb.png,,one\n',
        "a.png": image,
    }
    columns = write(tmp_path / "columns", both | {"b.png": image})
    assert captions(table(columns, caption=["short", "long"])) == ([MANY, ["one"]], [])
    members: dict[str, bytes | str] = {"a.png": image, "a.json": json.dumps({"short": "of it", "more": MANY[1:]})}
    shards = tar(tmp_path / "0.tar", {**members, "b.png": image, "b.txt": "\n".join(MANY)})
    found = table(shards, kind="webdataset", caption=["short", "more", "none"], caption_lines=True)
    assert captions(found) == ([MANY, MANY], [])
    columns = saved(tmp_path / "data", {"image": [image] * 2, "short": ["of it", None], "more": [MANY[1:], ["one"]]})
    assert captions(table(columns, kind="huggingface", caption=["short", "more"])) == ([MANY, ["one"]], [])
    assert "has no column 'none'" in refused(table(columns, kind="huggingface", caption=["short", "none"]))


def test_a_folder_is_listed_in_the_order_of_its_paths(tmp_path: Path) -> None:
    names = ["a.png", "a/b.png", "a/b/c.png", "a/b-.png", "a-/b.png", "A.png", "é/z.png", "b.PNG"]
    folder = write(tmp_path / "data", {name: encoded(picture()) for name in names})
    write(folder, {str(Path(name).with_suffix(".txt")): "of it" for name in names} | {"a/x.svg": ""})
    (folder / "link").symlink_to(folder / "a", target_is_directory=True)
    found, reported = read(table(folder))
    assert list(found) == [path.as_posix() for path in sorted(map(Path, names))]
    assert reported == ["not read: 1 .svg, such as a/x.svg (no image that Pillow reads); skipped"]


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
        tar(tmp_path / "data" / name, THREE)
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
    path = tar(tmp_path / "0.tar", files | THREE)
    found, reported = read(table(path, kind="webdataset"))
    assert list(found.values()) == list(CAPTIONS.values())
    said = [
        "0.tar/cut.png: the image cannot be decoded (image file is truncated",
        "0.tar/alone.png: there is no caption, neither .txt or .caption nor .json",
        "0.tar/words: there is no image, only .txt; expected one of .png",
        "0.tar/number.png: the caption (caption in its .json) is int, not text",
        "0.tar/other.png: there is no caption (caption in its .json is missing or empty)",
        "0.tar/list.png: its .json is not a JSON object",
        "0.tar/broken.png: its .json cannot be read (Expecting property name",
    ]
    assert all(line.startswith(start) for line, start in zip(reported, said, strict=True))


def test_a_damaged_shard_is_named_and_what_comes_before_the_damage_is_kept(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", THREE).read_bytes()
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
    assert reported.pop(2) == "1.tar/b.png: there is no caption, neither .txt or .caption nor .json; skipped"
    assert [line.split(":")[0] for line in reported] == [f"{number}.tar" for number in range(7)]
    said = dict(line.split(": ", 1) for line in reported)
    assert said["0.tar"] == "the shard is damaged (unexpected end of data); the rest is skipped"
    assert said["2.tar"] == said["6.tar"] == "the shard is damaged (it has no end marker); the rest is skipped"
    assert said["3.tar"].startswith("the shard is damaged (")
    assert said["5.tar"] == "the shard cannot be read (No such file or directory); skipped"


def test_shards_of_one_name_are_different_shards(tmp_path: Path) -> None:
    for folder in ("train", "extra"):
        tar(tmp_path / folder / "0.tar", THREE)
    found, reported = read(table(tmp_path / "{train,extra}" / "0.tar", kind="webdataset"))
    assert list(found) == [f"{folder}/0.tar/{key}" for folder in ("train", "extra") for key in CAPTIONS]
    assert reported == []


def test_a_compressed_shard_is_read_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz") as archive:
        archive.add(write(tmp_path / "files", THREE) / "a.png", "a.png")
        archive.add(tmp_path / "files" / "a.txt", "a.txt")
    assert read(table(tmp_path / "0.tar.gz", kind="webdataset")) == ({"0.tar.gz/a.png": "of a"}, [])
    whole = (tmp_path / "0.tar.gz").read_bytes()
    (tmp_path / "0.tar.gz").write_bytes(whole[: len(whole) // 2])
    said = refused(table(tmp_path / "0.tar.gz", kind="webdataset"))
    assert "0.tar.gz: the shard is damaged (Compressed file ended before the end-of-stream marker" in said


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


def test_a_dataset_is_another_one_once_its_files_are(tmp_path: Path) -> None:
    data = table(saved(tmp_path / "data", {"image": [encoded(picture())], "caption": ["of it"]}), kind="huggingface")
    before = sources.listing(data)
    (tmp_path / "data" / "cache-0.arrow").touch()  # as map leaves it
    assert sources.listing(data) == before
    saved(tmp_path / "data", {"image": [encoded(picture())], "caption": ["of that"]})
    assert sources.listing(data) != before


def test_shards_are_others_once_their_files_are(tmp_path: Path) -> None:
    data = table(tar(tmp_path / "0.tar", THREE).parent / "{0..1}.tar", kind="webdataset")
    found = [sources.listing(data)]
    tar(tmp_path / "1.tar", THREE)
    found.append(sources.listing(data))
    tar(tmp_path / "0.tar", {**THREE, "a.txt": "of A"})
    assert len({*found, sources.listing(data)}) == 3
    assert not sources.is_gone(data)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    assert sources.is_gone(data)


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
