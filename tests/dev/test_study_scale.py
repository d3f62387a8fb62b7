"""The costs of a distillation at real scale, on paper: counts against what else is known, and signs."""

from __future__ import annotations

import itertools

import pytest
import torch

from koala_sdxl.distill import footprint
from koala_sdxl.distill.study import scale, scale_page
from koala_sdxl.koala.architecture.keys import parameters
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, SDXL, Layout, name
from tools.harness.testhost import ROOT
from tools.measure.bench import store

ATTENTION = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("layout", [SDXL, *scale.STUDENTS])
def test_the_counted_unets_have_the_weights_that_their_layouts_say(layout: Layout) -> None:
    unet = scale._unet(layout, "meta")
    assert sum(weight.numel() for weight in unet.parameters()) == parameters(layout)
    root, units = footprint.fsdp_units(layout)
    assert root + sum(units.values()) == parameters(layout)


@pytest.mark.parametrize("layout", [SDXL, *scale.STUDENTS])
def test_multiplications_are_those_of_the_benchmark(layout: Layout) -> None:
    unets = store.shared(ROOT / "docs")["macs"]["figures"]["unets"]
    known = unets["SDXL" if layout == SDXL else name(layout)]["sizes"]["1024"]
    assert scale.unet_macs(layout) == sum(known.values())


@pytest.mark.parametrize("student", scale.STUDENTS)
def test_checkpointing_takes_less_memory_and_more_arithmetic(student: Layout) -> None:
    found = scale.activations(student)
    assert 0 < found.recomputed < found.kept + found.recomputed < found.plain
    assert found.per_image(True) < found.per_image(False)
    assert scale.step_flops(student, True) - scale.step_flops(student, False) == 2 * scale.unet_macs(student)
    assert scale.gpu_hours(student, True, 0.4) > scale.gpu_hours(student, False, 0.4) > 0


def test_features_are_the_outputs_of_self_attention() -> None:
    found = scale.activations(KOALA_700M)
    places = 6 * 640 * 64 * 64 + 15 * 1280 * 32 * 32  # layers x channels x tokens, of the middle and the deep stages
    assert found.student_features == found.teacher_features == 2 * places
    assert found.loss == 4 * places


@pytest.mark.parametrize("student", scale.STUDENTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_grows_with_the_batch(student: Layout, checkpointing: bool) -> None:
    found = scale.memory(student, checkpointing)
    sizes = [found.of(batch) for batch in range(5)]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 2 * parameters(SDXL) + 22 * parameters(student)
    for card in scale.CARDS.values():
        batch = scale.largest_batch(found, card)
        assert found.of(batch + 1) > scale.USABLE * card
        assert batch == 0 or found.of(batch) <= scale.USABLE * card


@pytest.mark.parametrize("student", scale.STUDENTS)
def test_sharding_makes_room(student: Layout) -> None:
    alone, shared, both = (scale.memory(student, True, *gpus).fixed for gpus in ((1, 1), (4, 1), (4, 4)))
    assert both < shared < alone
    assert shared > 2 * parameters(SDXL) + 20 * parameters(student) / 4


@pytest.mark.parametrize("student", scale.STUDENTS)
def test_each_saving_makes_room(student: Layout) -> None:
    found = [
        scale.memory(student, checkpointing, table=scale.TABLE.model_copy(update=keys), teacher_dtype=dtype)
        for _, checkpointing, keys, dtype in scale_page._SAVINGS
    ]
    weights = parameters(student)
    fixed = [one.fixed for one in found]
    assert fixed[0] == fixed[1] == 2 * parameters(SDXL) + 22 * weights
    assert [before - after for before, after in itertools.pairwise(fixed[1:])] == [
        6 * weights,  # moments
        4 * weights,  # the average
        parameters(SDXL),
    ]
    assert found[3].average_on_cpu == 4 * weights
    assert found[0].per_image > found[1].per_image
    for card in scale.CARDS.values():
        batches = [scale.largest_batch(one, card) for one in found]
        assert batches == sorted(batches)


def test_a_million_pictures_take_known_room() -> None:
    assert scale.cache_bytes(10**6) == {
        "latents": 131_072_000_000,
        "context": 315_392_000_000,
        "pooled": 2_560_000_000,
    }


def test_counting_leaves_torch_as_it_was() -> None:
    scale.activations(KOALA_700M)
    assert torch.nn.functional.scaled_dot_product_attention is ATTENTION
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cuda")


def test_the_section_tells_it_all() -> None:
    text = scale_page.section()
    assert text.startswith("## Full size, calculated\n")
    assert text.endswith(".\n")
    heads = [line for line, below in zip(text.splitlines(), text.splitlines()[1:], strict=False) if below[:4] == "|---"]
    assert [head.split(" | ")[0] for head in heads] == [
        "| U-Net",
        "| part",
        "| student",
        "| student",
        "| student",
        "| cache of a million images, fp16",
        "| student",
    ]
    for layout in (KOALA_700M, KOALA_1B):
        assert f"| {name(layout)} | {parameters(layout) / 1e6:,.0f} | {scale.unet_macs(layout) / 1e12:.2f} |" in text
