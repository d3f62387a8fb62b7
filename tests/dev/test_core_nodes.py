"""docs/core-nodes.md lists every node of the tested ComfyUI that takes and gives a MODEL."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.measure import history
from tools.measure.nodes import page, runs
from tools.measure.nodes.inputs import LEFT_OUT, filled, host_nodes, reason_left_out
from tools.measure.nodes.runs import Place


def test_the_page_lists_every_node_of_the_host_or_why_it_was_not_run() -> None:
    entry = history.read(page.HISTORY)[-1]
    assert set(entry["figures"]) == set(host_nodes())
    text = page.PAGE.read_text("utf-8")
    assert text == page.page(entry)
    assert [name for name in host_nodes() if f"`{name}`" not in text] == []
    assert all(
        entry["figures"][name] == {"reason": reason} for name in host_nodes() if (reason := reason_left_out(name))
    )


def test_a_run_goes_on_with_the_nodes_that_it_did_not_reach() -> None:
    before = {"measured": {"700M": {}}, "left out": {"reason": "needs a sound"}, "later": {"reason": page.NOT_REACHED}}
    assert page.not_reached((*before, "new"), before) == ["later", "new"]


def test_every_node_that_is_left_out_is_one_of_the_hosts() -> None:
    assert LEFT_OUT.keys() <= host_nodes().keys()


def test_every_other_node_can_be_fed() -> None:
    with runs.prepared():
        model = runs.models()["700M"][0]
        for name in host_nodes():
            if not reason_left_out(name):
                assert model in filled(name, model, runs.fixtures_of("700M")).values()


@pytest.mark.parametrize(
    ("node", "model", "outcome"),
    [
        ("FreeU", "1B", "works"),
        ("PerturbedAttentionGuidance", "1B", "works"),
        ("PerturbedAttentionGuidance", "700M", "no effect"),
        ("SelfAttentionGuidance", "700M", "refused"),
    ],
)
def test_what_comes_of_a_node(node: str, model: str, outcome: str) -> None:
    with runs.prepared():
        found = runs.run(node, Place(model, "KOALA Sampler", runs.ALONE))
    assert found.outcome == outcome


@pytest.mark.nightly
def test_an_empty_negative_prompt_spoils_with_normalized_attention_guidance() -> None:
    with runs.prepared():
        place = Place("700M", "KOALA Sampler", runs.ALONE)
        assert runs.run("NAGuidance", place).outcome == "works"
        assert runs.run("NAGuidance", replace(place, empty_negative=True)).outcome == "spoils"
