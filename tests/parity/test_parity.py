"""The figures of docs/parity.md, each held to its bound."""

from __future__ import annotations

import pytest

from tools.measure import parity
from tools.synthetic import random_weights


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


def test_koala_700ms_layers_give_what_diffusers_gives_in_narrow_widths() -> None:
    row = parity.of_random_weights("koala-700m, narrow", random_weights.narrow_unet("koala-700m"))
    assert row.holds, row


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
@pytest.mark.parametrize("name", parity.FULL_SIZE)
def test_full_size_gives_what_diffusers_gives(name: str) -> None:
    row = parity.full_size(name)
    assert row.holds, row
