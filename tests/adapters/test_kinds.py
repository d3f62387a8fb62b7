"""What peft, lycoris-lora and diffusers write, on KOALA: right by their own merge, or refused and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from koala_sdxl.koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, Layout, name
from tests.daily import daily
from tools.harness import testhost
from tools.measure.transfer.libraries import by_peft
from tools.measure.transfer.libraries.compare import BOUND, Outcome, compare, compare_own, outcome
from tools.measure.transfer.libraries.kinds import KINDS, LIBRARIES
from tools.measure.transfer.libraries.sdxl import Kind


def named(kind: str) -> Kind:
    """The kind of that name."""
    return next(known for known in KINDS if str(known) == kind)


BY_DAY = {
    "peft, LoRA",
    "peft, LoRA without adapter_config.json",
    "peft, LoRA, rank and alpha patterns",
    "peft, LoRA, lora_bias",
    "peft, LoRA, bias='lora_only'",
    "peft, LoRA, modules_to_save",
    "peft, DoRA of convolutions",
    "peft, PiSSA",
    "peft, LoHa of convolutions",
    "peft, LoKr of convolutions",
    "peft, AdaLoRA",
    "peft, IA3",
    "peft, PEFT's OFT",
    "lycoris-lora, LoCon, Tucker",
    "lycoris-lora, LoHa, Tucker",
    "lycoris-lora, LoKr",
    "lycoris-lora, LoKr by the general wrapper",
    "lycoris-lora, GLoRA",
    "lycoris-lora, DoRA on LoKr",
    "lycoris-lora, OFT, rescaled",
    "lycoris-lora, BOFT at 0.6",
    "lycoris-lora, norms",
    "lycoris-lora, full",
    "lycoris-lora, LyCORIS's IA3",
    "diffusers, LoRA with text encoders, kohya's format",
    "diffusers, DoRA with text encoders",
}
"""Of each library every kind of weight and every outcome; what else there is of a kind is tried at night."""


def kinds(chosen: Callable[[Kind], bool]) -> pytest.MarkDecorator:
    """A test for each of these kinds."""
    wanted = [kind for kind in KINDS if chosen(kind)]
    return pytest.mark.parametrize("kind", daily(wanted, [kind for kind in wanted if str(kind) in BY_DAY]), ids=str)


def test_what_runs_by_day_is_among_them() -> None:
    assert {str(kind) for kind in KINDS} >= BY_DAY


@kinds(lambda kind: not kind.refused and not kind.left_out)
def test_a_file_gives_what_its_library_merges(kind: Kind) -> None:
    found = compare(kind, KOALA_700M)[0]
    assert not found.refused, found.report
    for part in (found.unet, found.text):
        assert (part.wrong, part.untouched) == (0, 0), found.report
        assert part.difference <= BOUND
    assert found.unet.right
    assert (found.applied, found.text_applied) == (found.unet.modules, found.text.modules), found.report
    assert found.logged == ()


@kinds(lambda kind: bool(kind.refused))
def test_a_kind_that_is_not_applied_is_refused_by_its_own_name(kind: Kind) -> None:
    found = compare(kind, KOALA_700M)[0]
    assert found.refused, found.report
    assert re.search(kind.refused, found.report.splitlines()[0])


@kinds(lambda kind: bool(kind.left_out))
def test_a_module_that_is_not_applied_is_left_as_it_was_and_named(kind: Kind) -> None:
    found = compare(kind, KOALA_700M)[0]
    assert not found.refused, found.report
    assert found.unet.wrong == 0
    assert found.unet.right
    assert found.unet.untouched
    assert found.applied == found.unet.modules - found.unet.left, found.report
    assert re.search(kind.left_out, found.report)
    assert found.logged == ()


@pytest.mark.parametrize(
    "kind", daily(map(named, ("peft, DoRA", "lycoris-lora, LoCon")), [named("peft, DoRA")]), ids=str
)
def test_the_same_on_larger_koalas(kind: Kind) -> None:
    for found in compare(kind, KOALA_1B, KOALA_1_7B):
        assert (found.unet.wrong, found.unet.untouched) == (0, 0)
        assert 63 < found.unet.right == found.applied


@pytest.mark.parametrize(
    "kind", [*map(named, ("peft, rsLoRA", "lycoris-lora, LoCon", "diffusers, DoRA with text encoders"))], ids=str
)
@pytest.mark.parametrize("koala", daily([KOALA_700M, KOALA_1B], [KOALA_700M]), ids=name)
def test_an_adapter_that_was_trained_on_koala_is_applied_unchanged(kind: Kind, koala: Layout) -> None:
    found = compare_own(kind, koala)
    for part in (found.unet, found.text):
        assert (part.wrong, part.untouched) == (0, 0), found.report
    assert (found.applied, found.text_applied) == (found.unet.modules, found.text.modules), found.report
    assert "removed" not in found.report


def test_a_part_of_koalas_layers_proves_itself_by_its_shapes() -> None:
    """The first stages on the way up have SDXL's names and widths of their own."""
    kind = by_peft.lora("of two layers", lora_alpha=8, target_modules=r"up_blocks\.0\.resnets\.[01]\.conv1")
    found = compare_own(kind, KOALA_700M)
    assert (found.unet.right, found.applied) == (2, 2), found.report
    assert "trained on koala-tiny" in found.report


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("peft, LoRA", "alpha and rank as adapter_config.json says"),
        ("peft, LoRA without adapter_config.json", "alpha is unknown for 63 modules"),
        ("diffusers, rsLoRA with text encoders", "alpha and rank as its metadata says"),
        ("diffusers, LoRA with text encoders, no metadata", "alpha is unknown for 87 modules"),
    ],
)
def test_the_report_says_where_the_strength_comes_from(kind: str, said: str) -> None:
    found = compare(named(kind), KOALA_700M)[0]
    assert f"strength: {said}" in found.report


def test_the_comparison_tells_right_from_wrong_and_untouched() -> None:
    before = {f"{module}.weight": torch.zeros(2) for module in "abcd"}
    wanted = {**before, "a.weight": torch.ones(2), "b.weight": torch.ones(2), "c.weight": torch.ones(2)}
    ours = {**wanted, "b.weight": torch.full((2,), 0.5), "c.weight": torch.zeros(2), "d.weight": torch.ones(2)}
    assert outcome(ours, wanted, before) == Outcome(right=1, wrong=2, untouched=1, difference=0.0, modules=3, left=1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_library_is_the_pinned_one(library: str) -> None:
    lines = testhost.requirement_lines((Path(testhost.ROOT) / "tools" / "requirements-dev.txt").read_text("utf-8"))
    assert f"{library}=={version(library)}" in lines
