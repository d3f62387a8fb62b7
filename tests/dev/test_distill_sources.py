"""Pictures with captions as the trainer reads them: real small files of each kind, whole and broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import ImageFile

from koala_sdxl.distill import sources
from koala_sdxl.distill.config import DataTable
from tests.dev.distill_pictures import encoded, noise, picture, read, refused, table, tar, write

datasets.disable_progress_bars()


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
