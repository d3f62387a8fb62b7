"""docs/reliability.md: the newest figures, and tests that there are."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tools.harness.errors import UserError
from tools.harness.testhost import ROOT
from tools.measure import history, reliability, soak


def test_the_page_is_written_from_the_history() -> None:
    assert reliability.PAGE.read_text("utf-8") == reliability.page(history.read(reliability.HISTORY))


def test_the_newest_campaign_has_no_faults() -> None:
    newest = history.newest(history.read(reliability.HISTORY), "kind")[("fuzz",)]["figures"]
    assert newest["cases"] >= 2000
    assert sum(sum(counts.values()) for counts in newest["kinds"].values()) == newest["cases"]
    assert all(counts.keys() <= {"refused", "loaded"} for counts in newest["kinds"].values())


@pytest.mark.parametrize("test", [test for _, test in reliability.SHOWN])
def test_every_test_that_is_named_is_there(test: str) -> None:
    path, name = test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("readings", "growth"),
    [
        ([900.0] * 5 + [1000.0] * 45, 0.0),  # what is loaded in the beginning is no growth
        ([1000.0 + 0.5 * place for place in range(50)], 5.0),
    ],
)
def test_growth_is_of_what_comes_after_the_warm_up(readings: list[float], growth: float) -> None:
    found = soak.figures(readings)
    assert found["prompts"] == 500
    assert found["growth"] == pytest.approx(growth)


def test_the_graphs_of_a_soak_are_taken_by_the_server(object_info: dict[str, Any]) -> None:
    for number in range(15):
        for node in soak.graph(number).values():
            schema = object_info[node["class_type"]]["input"]
            known = {*schema.get("required", {}), *schema.get("optional", {})}
            assert {name.split(".")[0] for name in node["inputs"]} <= known
            assert {name.split(".")[0] for name in node["inputs"]} >= schema.get("required", {}).keys()


def test_too_few_prompts_are_told() -> None:
    with pytest.raises(UserError, match="expected 150 or more"):
        soak.main(["--prompts", "20"])
