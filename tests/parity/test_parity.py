"""The figures of docs/parity.md, each held to its bound."""

from __future__ import annotations

import pytest

from tools.measure import parity


@pytest.mark.parametrize("case", parity.TINY_CASES, ids=lambda case: case.name)
def test_koala_tiny_gives_what_the_diffusers_pipeline_gives(case: parity.Case) -> None:
    for row in parity.tiny(case):
        assert row.holds, row


def test_scheduler_in_a_custom_sampling_graph_gives_what_diffusers_gives() -> None:
    row = parity.tiny_custom_graph()
    assert row.holds, row


def test_sigmas_equal_diffusers_for_every_step_count_and_spacing() -> None:
    row = parity.scheduler_sigmas()
    assert row.holds, row


@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
@pytest.mark.parametrize(
    "name", ["koala-700m", *(pytest.param(name, marks=pytest.mark.nightly) for name in parity.FULL_SIZE[1:])]
)
def test_full_size_gives_what_diffusers_gives(name: str) -> None:
    row = parity.full_size(name)
    assert row.holds, row
