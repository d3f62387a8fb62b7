"""What peft, lycoris-lora and diffusers write, on KOALA: right by their own merge, or refused and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from koala_sdxl.koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, Layout, name
from tools.harness import testhost
from tools.measure.transfer.libraries import by_peft
from tools.measure.transfer.libraries.compare import BOUND, Outcome, compare, compare_own, outcome
from tools.measure.transfer.libraries.kinds import KINDS, LIBRARIES
from tools.measure.transfer.libraries.sdxl import Kind


def kinds(chosen: Callable[[Kind], bool]) -> pytest.MarkDecorator:
    """A test for each of these kinds."""
    return pytest.mark.parametrize("kind", [kind for kind in KINDS if chosen(kind)], ids=str)


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


@kinds(lambda kind: str(kind) in ("peft, DoRA", "lycoris-lora, LoCon"))
def test_the_same_on_larger_koalas(kind: Kind) -> None:
    for found in compare(kind, KOALA_1B, KOALA_1_7B):
        assert (found.unet.wrong, found.unet.untouched) == (0, 0)
        assert 63 < found.unet.right == found.applied


@kinds(lambda kind: str(kind) in ("peft, rsLoRA", "lycoris-lora, LoCon", "diffusers, DoRA with text encoders"))
@pytest.mark.parametrize("koala", [KOALA_700M, KOALA_1B], ids=name)
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
    found = compare(next(known for known in KINDS if str(known) == kind), KOALA_700M)[0]
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
