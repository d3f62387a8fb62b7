"""The figures of docs/transfer.md: what of SDXL's adapters reaches which KOALA layer, by stock nodes and by ours."""

from __future__ import annotations

import pytest

from koala_sdxl.koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, Layout, name
from tools.measure import transfer
from tools.synthetic import adapters

SQUARES = [(koala, kind) for koala in transfer.KOALAS for kind in adapters.KINDS]
BY_DAY = [(koala, kind) for koala, kind in SQUARES if koala == KOALA_700M or kind == "LoRA"]


@pytest.mark.parametrize(
    ("koala", "kind"),
    [pytest.param(*square, marks=[] if square in BY_DAY else pytest.mark.nightly) for square in SQUARES],
    ids=lambda part: part if isinstance(part, str) else name(part),
)
def test_a_lora_before_the_cut_equals_one_after_it(koala: Layout, kind: str) -> None:
    found = transfer.square(koala, kind)
    assert found.difference <= transfer.SQUARE_BOUND
    assert found.change > 1000 * transfer.SQUARE_BOUND


@pytest.mark.parametrize(
    ("kind", "naming"),
    [*(("LoRA", naming) for naming in adapters.NAMINGS), ("DoRA", "diffusers, PEFT"), ("DoRA", "PEFT")],
)
def test_the_same_under_every_name(kind: str, naming: str) -> None:
    assert transfer.square(KOALA_700M, kind, naming).difference <= transfer.SQUARE_BOUND


@pytest.mark.parametrize(
    ("koala", "naming", "stock"),
    [
        (KOALA_700M, "kohya, LDM blocks", (52, 74, 96, 126, 44, 552)),
        (KOALA_700M, "kohya, diffusers blocks", (148, 74, 0, 222, 0, 500)),
        (KOALA_1B, "kohya, LDM blocks", (124, 84, 106, 208, 44, 470)),
        (KOALA_1B, "kohya, diffusers blocks", (230, 84, 0, 314, 0, 408)),
    ],
)
def test_every_module_gets_its_own_layers_change(koala: Layout, naming: str, stock: tuple[int, ...]) -> None:
    assert transfer.reach(koala, naming, ours=False) == stock
    ours = transfer.reach(koala, naming, ours=True)
    assert (ours.right, ours.wrong, ours.untouched) == ({KOALA_700M: 222, KOALA_1B: 314}[koala], 0, 0)


@pytest.mark.parametrize(
    ("koala", "stock", "ours"),
    [(KOALA_700M, (2, 1, 5), (6, 6, 0)), (KOALA_1B, (2, 2, 5), (7, 7, 0)), (KOALA_1_7B, (2, 2, 5), (7, 7, 0))],
    ids=["700M", "1B", "1.7B"],
)
def test_every_residual_is_added_in_its_place(koala: Layout, stock: tuple[int, ...], ours: tuple[int, ...]) -> None:
    assert transfer.residuals(koala, ours=False) == stock
    assert transfer.residuals(koala, ours=True) == ours


@pytest.mark.parametrize(
    ("koala", "stock", "ours"),
    [(KOALA_700M, (5, 7, 4, 5), 21), (KOALA_1B, (12, 8, 4, 6), 30), (KOALA_1_7B, (20, 12, 4, 10), 46)],
    ids=["700M", "1B", "1.7B"],
)
def test_every_cross_attention_layer_gets_its_own_patch(koala: Layout, stock: tuple[int, ...], ours: int) -> None:
    assert transfer.patched_layers(koala, ours=False) == stock
    assert transfer.patched_layers(koala, ours=True) == (ours, 0, 0, 0)
