"""What a batch has drawn and knows, as files: whole or not there, found again, told right."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from batch import columns, manifest, plan, resume, store
from batch.manifest import Outcome
from batch.plan import Plan, Recipe, Row
from batch.store import File, StorageError, Store
from batch.workflow import Workflow
from tools.harness.errors import UserError

ONE, TWO, THREE = (letter * 24 for letter in "abc")
GRAPH = {"1": {"class_type": "Draw", "inputs": {"seed": 1, "model": "m.safetensors"}}}
INFO = {"Draw": {"input": {"required": {"seed": ["INT", {"min": 0, "max": 99}], "model": [["m.safetensors"]]}}}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "WAITS", (0.0,))


@pytest.fixture
def output(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def job(*numbers: int, column: str = "seed") -> Plan:
    rows = tuple(Row(place, one, (number,)) for place, (number, one) in enumerate(zip(numbers, (ONE, TWO, THREE)), 1))  # noqa: B905
    places = columns.places(GRAPH, ["seed"], "t")
    return Plan(Recipe(Workflow("w", GRAPH, None), (column,), {column: places["seed"]}, "t", INFO, {}), rows, 0)


def test_a_rows_files_are_found_again(output: Store) -> None:
    made = output.save(ONE, [File(".png", b"first"), File(".webp", b"second")])
    assert [one.file for one in made] == [f"pictures/aa/{ONE}.png", f"pictures/aa/{ONE}-001.webp"]
    assert made[0].sha256 == hashlib.sha256(b"first").hexdigest()
    assert output.find(ONE) == made
    assert list(output.rows()) == [ONE]
    assert output.find(TWO) == ()


def test_a_row_without_its_first_file_is_not_done(output: Store, tmp_path: Path) -> None:
    output.save(ONE, [File(".png", b"first"), File(".png", b"second")])
    (tmp_path / "out" / "pictures" / "aa" / f"{ONE}.png").unlink()
    assert output.find(ONE) == ()
    assert list(output.rows()) == []


def test_what_is_no_picture_of_a_job_is_left_alone(output: Store, tmp_path: Path) -> None:
    output.save(ONE, [File(".png", b"first")])
    folder = tmp_path / "out" / "pictures" / "aa"
    (folder / f"{ONE}-copy.png").write_bytes(b"a person's")
    (folder / f"{TWO}.png").write_bytes(b"")  # what a machine that lost its power may leave
    (folder / ".unfinished-1").write_bytes(b"half")
    assert list(output.rows()) == [ONE]
    assert [one.file for one in output.find(ONE)] == [f"pictures/aa/{ONE}.png"]
    output.clear()
    assert sorted(path.name for path in folder.iterdir()) == [f"{ONE}-copy.png", f"{ONE}.png", f"{TWO}.png"]


def test_an_output_that_has_gone_is_a_storage_error(output: Store, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("no folder any more")
    for work in (
        lambda: output.save(ONE, [File(".png", b"first")]),
        lambda: manifest.append(output, [Outcome(1, ONE, "{}")]),
    ):
        with pytest.raises(StorageError, match="cannot be written now"):
            work()


def test_a_write_is_tried_again(output: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").write_text("no folder yet")
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "out").unlink())
    output.write("x", b"content")
    assert output.read("x") == b"content"


def test_a_password_is_not_shown() -> None:
    assert Store("s3://key:secret@bucket/job?endpoint_override=host").shown == "s3://bucket/job"
    assert Store("/folder@home/x").shown == "/folder@home/x"


def test_a_location_that_is_none_is_refused_in_words() -> None:
    with pytest.raises(UserError, match="no place to write to"):
        store.open_location("nowhere://bucket")


def test_the_manifest_is_merged_and_the_later_word_counts(output: Store) -> None:
    manifest.append(output, [Outcome(2, TWO, "{}", error="bad"), Outcome(1, ONE, "{}", ("a",), ("b",), 1.5, "w", 2.0)])
    manifest.append(output, [Outcome(2, TWO, "{}", ("c",), ("d",))])
    manifest.append(output, [])
    assert len(output.names(manifest.PARTS)) == 2
    manifest.merge(output)
    assert output.names(manifest.PARTS) == []
    table = parquet.read_table(Path(output.location) / manifest.FILE)
    assert table.schema == manifest.SCHEMA
    assert table.column("id").to_pylist() == [ONE, TWO]
    assert manifest.read(output)[TWO].error is None
    assert manifest.read(output)[ONE] == Outcome(1, ONE, "{}", ("a",), ("b",), 1.5, "w", 2.0)


def test_a_damaged_part_is_named(output: Store) -> None:
    output.write(f"{manifest.PARTS}/1.parquet", b"PAR1 and no more")
    with pytest.raises(StorageError, match=r"manifest/1\.parquet is damaged"):
        manifest.read(output)


def test_pictures_decide_what_is_done(output: Store) -> None:
    output.save(ONE, [File(".png", b"first")])
    manifest.append(output, [Outcome(2, TWO, '{"seed": 2}', error="bad"), Outcome(3, THREE, '{"seed": 3}')])
    found = resume.state(job(1, 2, 3), output)
    assert [row.id for row in found.done] == [ONE]
    assert [one.id for one in found.errors] == [TWO]
    assert [row.id for row in found.left] == [THREE]  # its picture was taken away
    assert [(one.id, one.files) for one in found.untold] == [(ONE, (f"pictures/aa/{ONE}.png",))]
    ids = [
        [row.id for row in resume.to_draw(job(1, 2, 3), found, *how)]
        for how in ((False, None), (True, None), (True, 1))
    ]
    assert ids == [[THREE], [TWO, THREE], [TWO]]


def test_a_table_that_has_changed_is_told_anew(output: Store) -> None:
    pictures = output.save(TWO, [File(".png", b"second")])
    manifest.append(output, [Outcome(7, TWO, '{"seed": 2}', seconds=3.0).with_pictures(pictures)])
    (told,) = resume.state(job(1, 2), output).untold
    assert (told.row, told.inputs, told.seconds, told.files) == (2, '{"seed": 2}', 3.0, (pictures[0].file,))
    manifest.append(output, [told])
    assert resume.state(job(1, 2), output).untold == ()
    (told,) = resume.state(job(1, 2, column="Draw.seed"), output).untold
    assert told.inputs == '{"Draw.seed": 2}'


def ids(graph: dict, rows: list[tuple], files: dict[str, str] | None = None, version: str = "1") -> list[str]:
    table = plan.Table("t", ("seed",), tuple(rows))
    known = dict.fromkeys(("Draw", "KoalaDraw"), INFO["Draw"])
    made = plan.make(Workflow("w", graph, None), table, known, lambda names: files or {}, version)
    return [row.id for row in made.rows]


def named(kind: str) -> dict:
    return {"1": {**GRAPH["1"], "class_type": kind}}


def test_an_id_stands_for_all_that_decides_the_picture() -> None:
    rows = [(1,), (2,)]
    first = ids(GRAPH, rows)
    assert len(set(first)) == 2
    assert ids({"1": {**GRAPH["1"], "_meta": {"title": "another"}}}, rows) == first
    assert ids(GRAPH, [("1",), (2.0,)]) == first
    assert ids(GRAPH, rows, {"m.safetensors": "one"}) != ids(GRAPH, rows, {"m.safetensors": "two"})
    assert ids(GRAPH, rows, version="2") == first  # no node of the pack
    assert ids(named("KoalaDraw"), rows, version="2") != ids(named("KoalaDraw"), rows)


def test_rows_that_repeat_are_one() -> None:
    assert len(ids(GRAPH, [(1,), (2,), ("1",), (1.0,)])) == 2


@pytest.mark.parametrize(
    ("value", "words"), [(1.5, "expected a whole number"), (100, "expected a number from 0 to 99")]
)
def test_what_the_host_would_round_or_refuse(value: object, words: str) -> None:
    with pytest.raises(UserError, match=f"t, row 1: column seed is {value}, {words}"):
        ids(GRAPH, [(value,)])
