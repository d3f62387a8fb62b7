"""The student that is cut out of the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from koala_sdxl.distill import student
from koala_sdxl.distill.errors import UserError
from koala_sdxl.koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, KOALA_TINY
from koala_sdxl.koala.architecture.lineage import KEPT_TRANSFORMERS, at_widths_of, lineage
from tests.dev import distill_student
from tests.dev.distill_student import State, planned
from tools.synthetic.random_weights import unet_state
from tools.tiny.grow import SDXL_TINY

WHOLE_LAYERS = {"down": [[0, 0], [2, 2], [4, 4]], "up": [[4, 4, 4], [2, 2, 2], [0, 0, 0]], "middle": 4}

weights = pytest.fixture(scope="module")(distill_student.weights)
teacher = pytest.fixture(scope="module")(distill_student.teacher)


def refused(**table: Any) -> str:
    with pytest.raises(UserError) as problem:
        planned(**table)
    assert str(problem.value).startswith("student.layout: ")
    return str(problem.value)


@pytest.mark.parametrize(
    ("name", "wide"), [("koala-700m", KOALA_700M), ("koala-1b", KOALA_1B), ("koala-1.7b", KOALA_1_7B)]
)
def test_the_first_blocks_give_the_published_lineage(name: str, wide: Any) -> None:
    line = planned(layout=name)
    assert line == lineage(at_widths_of(KOALA_TINY, wide))
    assert line.transformers == KEPT_TRANSFORMERS[wide]
    assert line.teacher == SDXL_TINY


def test_even_keeps_the_first_the_last_and_what_lies_between() -> None:
    line = planned(layout="koala-700m", transformers="even")
    assert line.transformers["down_blocks.2.attentions.0"] == (0, 2, 4, 6, 9)
    assert line.transformers["down_blocks.1.attentions.0"] == (0, 1)
    for depth in range(1, 11):
        kept = student.RULES["even"](depth, 10)
        assert len(set(kept)) == depth
        assert kept == tuple(sorted(kept))
        assert kept[0] == 0
        assert depth == 1 or kept[-1] == 9


def test_a_table_keeps_what_it_says() -> None:
    table = {module: list(kept) for module, kept in KEPT_TRANSFORMERS[KOALA_700M].items()}
    table["up_blocks.0.attentions.1"] = [1, 3, 4, 8, 9]
    line = planned(transformers=table)
    assert line.transformers["up_blocks.0.attentions.1"] == (1, 3, 4, 8, 9)
    assert line.ancestor("up_blocks.0.attentions.1.transformer_blocks.3.ff") == (
        "up_blocks.0.attentions.2.transformer_blocks.8.ff"
    )


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 1, 2, 3, 10], [0, 1, 2, 4, 3], [0, 1, 2, 3, 3], [-1, 1, 2, 3, 4]])
def test_a_table_that_does_not_fit_is_refused_with_the_module(kept: list[int]) -> None:
    table = {module: list(own) for module, own in KEPT_TRANSFORMERS[KOALA_700M].items()}
    said = refused(transformers=table | {"up_blocks.0.attentions.1": kept})
    assert f"up_blocks.0.attentions.1 is to keep the transformer blocks {kept}; expected 5 of 0 to 9" in said


def test_a_table_with_a_module_too_few_or_too_many_is_refused() -> None:
    table = {module: list(own) for module, own in KEPT_TRANSFORMERS[KOALA_700M].items()}
    assert "mid_block.attentions.0 is to keep the transformer blocks [0]; expected no such module" in refused(
        transformers=table | {"mid_block.attentions.0": [0]}
    )
    del table["down_blocks.1.attentions.0"]
    assert "down_blocks.1.attentions.0 is to keep the transformer blocks []; expected 2 of 0 to 1" in refused(
        transformers=table
    )


def test_a_student_may_keep_all_layers(teacher: UNet2DConditionModel, weights: State) -> None:
    line = planned(layout=WHOLE_LAYERS)
    assert line.student == replace(
        SDXL_TINY, down=((0, 0), (2, 2), (4, 4)), middle=4, up=((4,) * 3, (2,) * 3, (0,) * 3)
    )
    assert line.ancestor("down_blocks.1.resnets.1.conv1.weight") == "down_blocks.1.resnets.1.conv1.weight"
    assert line.ancestor("up_blocks.1.attentions.1.proj_in.weight") == "up_blocks.1.attentions.1.proj_in.weight"
    built = student.build(line, "teacher", teacher, seed=0).state_dict()
    assert all(torch.equal(built[part.diffusers], weights[part.diffusers]) for part, _ in line.tensors)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            {"down": [[0], [2], [11]], "up": [[11, 11], [2, 2], [0, 0]]},
            "down_blocks.2.attentions.0.transformer_blocks.10.",
        ),
        (
            {"down": [[0], [3], [5]], "up": [[5, 5], [3, 3], [0, 0]]},
            "down_blocks.1.attentions.0.transformer_blocks.2.",
        ),
        (
            {"down": [[1], [2], [5]], "up": [[5, 5], [2, 2], [1, 1]]},
            "down_blocks.0.attentions.0.transformer_blocks.0.",
        ),
        ({"down": [[0] * 3, [2] * 3, [5] * 3], "up": [[5] * 4, [2] * 4, [0] * 4]}, "its down stages have"),
        ({"down": [], "up": []}, "a stage has no layers"),
        ({"down": [[0], [], [2]], "up": [[2, 2], [1, 1], [0, 0]]}, "a stage has no layers"),
        ({"down": [[0], [2]], "up": [[2, 2], [0, 0]]}, "its down stages have [1, 1] layers; expected 1 or"),
        ({"down": [[0], [2], [5]], "up": [[5, 5, 5], [2, 2], [0, 0]]}, "diffusers' configuration cannot describe"),
        ({"down": [[0], [2], [5]], "up": [[5, 5], [2, 2], [0, 0]], "middle": 4}, "diffusers' configuration cannot"),
    ],
)  # fmt: skip
def test_what_is_no_subnetwork_is_refused_with_the_tensor(layout: dict[str, Any], said: str) -> None:
    assert said in refused(layout=layout)


@pytest.mark.parametrize("transformers", ["first", "even"])
@pytest.mark.parametrize("layout", ["koala-700m", "koala-1b"])
def test_the_first_weights_are_the_teachers(
    teacher: UNet2DConditionModel, weights: State, layout: str, transformers: str
) -> None:
    line = planned(layout=layout, transformers=transformers)
    network = student.build(line, "teacher", teacher, seed=0)
    built = network.state_dict()
    assert built.keys() == {part.diffusers for part, _ in line.tensors}
    assert all(torch.equal(built[part.diffusers], weights[whole.diffusers]) for part, whole in line.tensors)
    assert all(tensor.dtype == torch.float32 for tensor in built.values())
    next(network.parameters()).data.zero_()
    assert torch.equal(next(teacher.parameters()), weights[next(name for name, _ in teacher.named_parameters())])


def test_an_earlier_student_is_gone_on_with(teacher: UNet2DConditionModel, tmp_path: Path) -> None:
    line = planned()
    earlier = {name: tensor.half() for name, tensor in unet_state(line.student, seed=3).items()}
    save_file(earlier, tmp_path / "earlier.safetensors")
    built = student.build(line, tmp_path / "earlier.safetensors", teacher, seed=0).state_dict()
    assert all(torch.equal(built[name], tensor.float()) for name, tensor in earlier.items())
    with pytest.raises(UserError, match=r"^student\.start: .*earlier\.safetensors is a koala-tiny; expected a custom"):
        student.build(planned(layout="koala-1b"), tmp_path / "earlier.safetensors", teacher, seed=0)
    with pytest.raises(UserError, match=r"nowhere cannot be read"):
        student.build(line, tmp_path / "nowhere", teacher, seed=0)


def test_random_weights_come_from_the_seed_alone(teacher: UNet2DConditionModel) -> None:
    first, again, other = (student.build(planned(), "random", teacher, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])
