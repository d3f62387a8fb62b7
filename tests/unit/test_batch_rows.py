"""What a row does to a graph: values of the kind that is there, and nothing else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from batch.columns import Place, apply, places
from batch.table import Value
from batch.workflow import Graph
from tests.unit.batch_graphs import (
    KOALA,
    SEED,
    guided,
    image_controlled,
    node,
    refined,
    saved,
    sdxl,
    sdxl_encoders,
)
from tools.harness.errors import UserError

KINDS = {"1": node("Kinds", whole=5, real=7.5, on=True, text="old", other="same", link=["1", 0])}


def applied(column: str, value: Value) -> Any:
    """What a cell makes of an input; nothing else may change."""
    found = apply(KINDS, places(KINDS, [column], "t.csv"), [column], [value], "t.csv, row 7")
    inputs = found["1"]["inputs"]
    assert {**inputs, column: KINDS["1"]["inputs"][column]} == KINDS["1"]["inputs"]
    return inputs[column]


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("whole", "7", 7),
        ("whole", " -7 ", -7),
        ("whole", str(SEED), SEED),
        ("whole", SEED, SEED),
        ("whole", SEED - 2, SEED - 2),
        ("whole", "7.5", 7.5),
        ("whole", 7.5, 7.5),
        ("whole", 7.0, 7),
        ("whole", "7.0", 7),
        ("whole", "1e3", 1000),
        ("whole", "", 5),
        ("whole", "  ", 5),
        ("whole", None, 5),
        ("real", "3", 3),
        ("real", "3.25", 3.25),
        ("real", 3.0, 3.0),
        ("real", "", 7.5),
        ("real", None, 7.5),
        ("on", "FALSE", False),
        ("on", "no", False),
        ("on", "0", False),
        ("on", 0, False),
        ("on", False, False),
        ("on", " yes ", True),
        ("on", 1, True),
        ("on", "", True),
        ("on", None, True),
        ("text", "new", "new"),
        ("text", " new ", " new "),
        ("text", "", ""),
        ("text", " ", " "),
        ("text", None, "old"),
        ("text", "7", "7"),
        ("text", 7, "7"),
        ("text", SEED, str(SEED)),
        ("text", 7.5, "7.5"),
        ("text", True, "true"),
    ],
)
def test_a_cell_becomes_what_the_workflow_has_there(column: str, value: Value, expected: Value) -> None:
    found = applied(column, value)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("whole", "abc", "'abc', expected a number for Kinds · whole (node 1)"),
        ("whole", "1_000", "'1_000', expected a number"),
        ("whole", "1,5", "'1,5', expected a number"),
        ("whole", "0x10", "'0x10', expected a number"),
        ("whole", True, "True, expected a number"),
        ("whole", "nan", "'nan', expected a finite number"),
        ("real", "inf", "'inf', expected a finite number"),
        ("real", "1e999", "'1e999', expected a finite number"),
        ("real", float("nan"), "nan, expected a finite number"),
        ("real", float("-inf"), "-inf, expected a finite number"),
        ("whole", "1.8446744073709552e19", "expected a whole number of this size without decimals"),
        ("whole", float(2**63), "expected a whole number of this size without decimals"),
        ("on", "maybe", "'maybe', expected true or false for Kinds · on (node 1)"),
        ("on", 2, "2, expected true or false"),
    ],
)
def test_a_cell_that_cannot_be_that_is_refused_in_one_line(column: str, value: Value, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        applied(column, value)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"t.csv, row 7: column {column} is ")
    assert expected in line


def test_every_faulty_cell_of_a_row_has_its_line() -> None:
    columns = ["whole", "text", "on"]
    with pytest.raises(UserError) as caught:
        apply(KINDS, places(KINDS, columns, "t.csv"), columns, ["x", "y", "z"], "t.csv, row 7")
    assert len(str(caught.value).splitlines()) == 2


def test_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        apply(KINDS, places(KINDS, ["whole", "text"], "t.csv"), ["whole", "text"], [7], "t.csv, row 7")


def test_a_prompt_goes_to_every_encoder() -> None:
    for graph, expected in ((refined(), ("6.text", "15.text")), (sdxl_encoders(), ("6.text_g", "6.text_l"))):
        found = apply(graph, places(graph, ["prompt"], "t.csv"), ["prompt"], ["a tree"], "t.csv, row 1")
        for place in expected:
            name, _, key = place.partition(".")
            assert found[name]["inputs"][key] == "a tree"


GRAPHS: dict[str, Callable[[], Graph]] = {
    "usual": sdxl,
    "encoders": sdxl_encoders,
    "guided": guided,
    "refined": refined,
    "controlled": image_controlled,
    **{name: partial(saved, name) for name in KOALA},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_row_never_changes_the_workflow(name: str) -> None:
    """Random rows: the given graph stays, the new one has the row's values and nothing else new, and shares nothing."""
    graph = GRAPHS[name]()
    before = json.dumps(graph)
    columns = ["prompt", "negative", "width", "height"]
    found = places(graph, columns, "t.csv")
    chance = random.Random(name)
    for _ in range(50):
        size = chance.randrange(2**64)
        row = [chance.choice(["a", "", "b, c"]), chance.choice(["", None]), size, str(size - 1)]
        after = apply(graph, found, columns, row, "t.csv, row 1")
        assert json.dumps(graph) == before
        assert after.keys() == graph.keys()
        expected = dict(zip(columns, [*row[:3], size - 1], strict=True))
        values = {place: expected[column] for column, each in found.items() for place in each}
        for number, part in after.items():
            assert part["class_type"] == graph[number]["class_type"]
            for key, own in graph[number]["inputs"].items():
                value = values.get(Place(number, key))
                assert part["inputs"][key] == (own if value is None else value)
        for part in after.values():  # were anything shared, this would reach the workflow
            part["inputs"] |= dict.fromkeys(part["inputs"], "gone")
            part["inputs"]["new"] = part["class_type"] = "gone"
            part.setdefault("_meta", {})["title"] = "gone"
        assert json.dumps(graph) == before


def test_links_are_not_shared() -> None:
    graph = sdxl()
    before = copy.deepcopy(graph)
    after = apply(graph, {}, [], [], "t.csv, row 1")
    after["3"]["inputs"]["model"][0] = "gone"
    assert graph == before
