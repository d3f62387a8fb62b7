"""Tables of the batch tool: what each kind of file gives, grids, and one line for each bad table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from batch import table
from batch.table import Table, crossed, grid, read
from tools.harness.errors import UserError

SEED = 2**64 - 1


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


Write = Callable[[str, str | bytes], Path]


def stored(tmp_path: Path, columns: dict[str, Any]) -> Path:
    path = tmp_path / "table.parquet"
    parquet.write_table(pa.table(columns), path)
    return path


def complaint(call: Callable[[], Any]) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    return line


def test_csv(written: Write) -> None:
    text = 'prompt, seed\r\n"a red car, parked",7\r\n\r\n"two\nlines ""quoted""",18446744073709551615\r\n,\r\n'
    found = read(written("prompts.csv", text))
    assert found == Table(
        "prompts.csv",
        ("prompt", "seed"),
        (("a red car, parked", "7"), ('two\nlines "quoted"', "18446744073709551615"), ("", "")),
    )


def test_csv_with_excels_first_mark_and_no_last_line_break(written: Write) -> None:
    found = read(written("UPPER.CSV", "\ufeffprompt,seed\na café ☕,7".encode()))
    assert (found.columns, found.rows) == (("prompt", "seed"), (("a café ☕", "7"),))


def test_tsv(written: Write) -> None:
    found = read(written("prompts.tsv", "prompt\tseed\na red car, parked\t7\n"))
    assert (found.columns, found.rows) == (("prompt", "seed"), (("a red car, parked", "7"),))


@pytest.mark.parametrize("name", ["table.jsonl", "table.ndjson"])
def test_jsonl(written: Write, name: str) -> None:
    """Keys of every row, in order of appearance; a key that a row lacks is None. U+2028 is no line break."""
    rows: list[dict[str, Any]] = [
        {"seed": SEED, "prompt": "a\u2028b"},
        {"cfg": 7.5, "seed": 3, "tiled": True},
        {"prompt": None},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    found = read(written(name, text + "\n"))
    assert found.columns == ("seed", "prompt", "cfg", "tiled")
    assert found.rows == (
        (SEED, "a\u2028b", None, None),
        (3, None, 7.5, True),
        (None, None, None, None),
    )
    assert [type(value) for value in found.rows[1]] == [int, type(None), float, bool]


def test_parquet(tmp_path: Path) -> None:
    columns = {
        "seed": pa.array([SEED, None], pa.uint64()),
        "steps": pa.array([25, 10], pa.int8()),
        "cfg": pa.array([7.5, 3.5], pa.float32()),
        "tiled": [True, None],
        "prompt": pa.array(["a", "b"], pa.large_string()),
        "style": pa.array(["x", "x"]).dictionary_encode(),
        "negative": pa.nulls(2),
    }
    found = read(stored(tmp_path, columns))
    assert found.columns == tuple(columns)
    assert found.rows == ((SEED, 25, 7.5, True, "a", "x", None), (None, 10, 3.5, None, "b", "x", None))
    assert [type(value) for value in found.rows[0]] == [int, int, float, bool, str, str, type(None)]


def test_what_is_written_as_csv_is_read_back(written: Write) -> None:
    """Every character that a prompt can have, as the csv module writes it."""
    texts = [
        "",
        " ",
        "a,b",
        'say "hi"',
        "line\nline",
        "line\r\nline",
        "\u2028",
        "\U0001d542oala",
        "'",
        "a;b",
        "\t",
        "# no comment",
    ]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["prompt", "seed"], *([text, "1"] for text in texts)])
    assert [row[0] for row in read(written("t.csv", file.getvalue())).rows] == texts


@pytest.mark.parametrize(
    ("definition", "name", "values"),
    [
        ("seed=0..4", "seed", [0, 1, 2, 3, 4]),
        ("seed=-2..1", "seed", [-2, -1, 0, 1]),
        ("seed=5..5", "seed", [5]),
        ("steps=10..30..10", "steps", [10, 20, 30]),
        ("steps=10..35..10", "steps", [10, 20, 30]),
        (f"seed={SEED - 1}..{SEED}", "seed", [SEED - 1, SEED]),
        ("seed=0..2,9,20..21", "seed", [0, 1, 2, 9, 20, 21]),
        ("cfg=4,7.5", "cfg", [4, 7.5]),
        ("cfg=-1.5", "cfg", [-1.5]),
        ("tiled=true,False", "tiled", [True, False]),
        ("sampler_name=euler, heun", "sampler_name", ["euler", "heun"]),
        ('prompt="a red car, parked",a tree', "prompt", ["a red car, parked", "a tree"]),
        ('prompt="say ""hi""", "x, y"', "prompt", ['say "hi"', "x, y"]),
        ("prompt=a=b", "prompt", ["a=b"]),
        ("prompt=wait...,1..,..", "prompt", ["wait...", "1..", ".."]),
        ("negative=,blurry", "negative", ["", "blurry"]),
        ('negative=""', "negative", [""]),
        ("KSampler.cfg=4", "KSampler.cfg", [4]),
        ("word=007,1.50,1e3,nan,inf,1_0", "word", ["007", "1.50", "1e3", "nan", "inf", "1_0"]),
    ],
)
def test_a_grid_of_one(definition: str, name: str, values: list[table.Value]) -> None:
    found = grid([definition])
    assert (found.source, found.columns) == ("--grid", (name,))
    assert [value for (value,) in found.rows] == values
    assert [type(value) for (value,) in found.rows] == list(map(type, values))


def test_a_grid_of_two_varies_the_last_fastest() -> None:
    found = grid(["seed=0..1", "cfg=4,7.5"])
    assert found.columns == ("seed", "cfg")
    assert found.rows == ((0, 4), (0, 7.5), (1, 4), (1, 7.5))


def test_a_table_crossed_with_a_grid() -> None:
    prompts = Table("prompts.csv", ("prompt",), (("a",), ("b",)))
    found = crossed(prompts, grid(["seed=0..1", "cfg=4"]))
    assert found == Table(
        "prompts.csv with --grid",
        ("prompt", "seed", "cfg"),
        (("a", 0, 4), ("a", 1, 4), ("b", 0, 4), ("b", 1, 4)),
    )


BAD_FILES = {
    "table.xlsx": (b"PK", "suffix is '.xlsx', expected one of .csv, .tsv, .jsonl, .ndjson, .parquet"),
    "table": (b"prompt\na\n", "suffix is 'missing'"),
    "empty.csv": (b"", "the table is empty"),
    "blank.csv": (b"\n\n", "the table is empty"),
    "empty.jsonl": (b"\n", "the table is empty"),
    "keyless.jsonl": (b"{}\n", "the table is empty"),
    "header.csv": (b"prompt,seed\n", "the table has no rows"),
    "twice.csv": (b"seed,prompt, seed\n1,a,2\n", "the column 'seed' is there twice"),
    "nameless.csv": (b"prompt,,seed\na,b,c\n", "column 2 has no name"),
    "nameless.jsonl": (b'{"a": 1, " ": 2}', "column 2 has no name"),
    "short.csv": (b"prompt,seed\na,1\n\nb\n", "row 2: 1 cells, expected 2"),
    "long.csv": (b"prompt,seed\na red car, parked,1\n", "row 1: 3 cells, expected 2"),
    "open.csv": (b'prompt,seed\na,1\n"b,2\nc,3\n', "row 2: not well-formed CSV"),
    "stray.csv": (b'prompt,seed\n"a" b,1\n', "row 1: not well-formed CSV"),
    "header quote.csv": (b'"prompt,seed\n', "header: not well-formed CSV"),
    "german.csv": (b"prompt;seed\na;1\n", "separated by ';', expected ','"),
    "latin.csv": ("prompt\ncafé\n".encode("latin-1"), "not UTF-8 (byte 10)"),
    "latin.jsonl": ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8"),
    "utf-16.csv": ("prompt\na\n".encode("utf-16"), "not UTF-8 (byte 0)"),
    "cut.jsonl": (b'{"seed": 1}\n\n{"seed": \n', "row 2: not JSON"),
    "list.jsonl": (b'[{"seed": 1}]\n', "row 1: a JSON list, expected an object"),
    "word.jsonl": (b'{"seed": 1}\n"seed"\n', "row 2: a JSON str, expected an object"),
    "nested.jsonl": (b'{"seed": [1, 2]}\n', "row 1: 'seed' is nested (list)"),
    "deep.jsonl": (b"[" * 100_000, "row 1: not JSON"),
    "keys.jsonl": (b'{"seed": 1, "seed": 2}\n', "row 1: the key 'seed' is there twice"),
    "text.parquet": (b"prompt,seed\na,1\n", "not a Parquet file, or a damaged one"),
    "empty.parquet": (b"", "not a Parquet file, or a damaged one"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(written: Write, name: str) -> None:
    content, expected = BAD_FILES[name]
    line = complaint(lambda: read(written(name, content)))
    assert name in line
    assert expected in line


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl", "none.parquet"])
def test_a_missing_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    assert complaint(lambda: read(tmp_path / name)) == f"{tmp_path / name}: there is no such table; check the path"


@pytest.mark.parametrize("name", ["folder.csv", "folder.jsonl", "folder.parquet"])
def test_a_folder_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert "the table cannot be read: " in complaint(lambda: read(tmp_path / name))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([[1]]), "list<"),
        (pa.array([b"x"]), "binary"),
        (pa.array([{"a": 1}]), "struct<"),
        (pa.array([0], pa.timestamp("s")), "timestamp"),
        (pa.array([1], pa.decimal128(5)), "decimal128"),
        (pa.array([b"x"]).dictionary_encode(), "dictionary<values=binary"),
    ],
)
def test_a_parquet_column_that_no_input_takes_is_refused_in_one_line(tmp_path: Path, values: Any, kind: str) -> None:
    line = complaint(lambda: read(stored(tmp_path, {"seed": [1], "other": values})))
    assert f"table.parquet: column 'other' has the type {kind}" in line


def test_bad_parquet_files_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "no rows" in complaint(lambda: read(stored(tmp_path, {"seed": pa.array([], pa.int64())})))
    path = stored(tmp_path, {"seed": list(range(1000))})
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a Parquet file, or a damaged one" in complaint(lambda: read(path))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["seed", "seed"])
    parquet.write_table(twice, path)
    assert "the column 'seed' is there twice" in complaint(lambda: read(path))


@pytest.mark.parametrize(
    ("definitions", "expected"),
    [
        ([], "--grid: the table is empty"),
        (["seed"], "--grid seed: expected name=values"),
        (["seed="], "--grid seed=: expected name=values"),
        (["=1,2"], "--grid =1,2: expected name=values"),
        (["seed=9..0"], "the smaller number first"),
        (["seed=0..9..0"], "in steps of 1 or more"),
        (["seed=0..9..-1"], "in steps of 1 or more"),
        (["cfg=4..8..0.5"], "a range has whole numbers"),
        (["cfg=0.5..2"], "a range has whole numbers"),
        (["cfg=4,,5"], "a value between two commas is missing"),
        (["cfg=4,"], "a value between two commas is missing"),
        (['prompt="a'], "each as it is or in"),
        (["prompt=a\nb"], "values on one line"),
        (["seed=0..1", "cfg=4", "seed=7"], "--grid: the column 'seed' is there twice"),
        ([f"seed=0..{SEED}"], f"{SEED + 1} rows, expected at most 10000000"),
        (["a=0..9999", "b=0..9999"], "100000000 rows, expected at most 10000000"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line(definitions: list[str], expected: str) -> None:
    line = complaint(lambda: grid(definitions))
    assert line.startswith("--grid")
    assert expected in line


def test_a_column_of_table_and_grid_is_refused_in_one_line() -> None:
    prompts = Table("prompts.csv", ("prompt", "seed"), (("a", "1"),))
    line = complaint(lambda: crossed(prompts, grid(["cfg=4", "seed=0..9"])))
    assert line.startswith("prompts.csv with --grid: both have the column 'seed'")


def test_too_many_rows_are_refused_in_one_line() -> None:
    prompts = Table("prompts.csv", ("prompt",), (("a",),) * 5000)
    line = complaint(lambda: crossed(prompts, grid(["seed=0..4999"])))
    assert line == "prompts.csv with --grid: 25000000 rows, expected at most 10000000; give smaller ranges"
