"""Images and captions from WebDataset shards: what is read, and what is said of what is not."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from koala_sdxl.distill import sources
from tests.dev.distill_pictures import encoded, noise, picture, read, refused, table, tar, write

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
