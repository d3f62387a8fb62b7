"""What a distillation minimises: pairs of features, errors, and their weights by time step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from koala_sdxl.distill import config, features, losses, student
from koala_sdxl.distill.config import LossTable
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.objective import Objective
from koala_sdxl.koala.architecture.layout import SDXL
from koala_sdxl.koala.architecture.lineage import Lineage
from koala_sdxl.koala.files.export import unet_config
from tests.dev import distill_student
from tests.dev.distill_student import State, planned
from tools.measure import reference
from tools.tiny.grow import SDXL_TINY

weights = pytest.fixture(scope="module")(distill_student.weights)
teacher = pytest.fixture(scope="module")(distill_student.teacher)


# --- features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "place", "count"),
    [
        ("koala-700m", "self-attention", 2 + 5 + 2 * 5 + 2 * 2),
        ("koala-1b", "self-attention", 2 + 6 + 6 + 2 * 6 + 2 * 2),
        ("koala-700m", "cross-attention", 21),
        ("koala-1b", "feed-forward", 30),
        ("koala-700m", "residual", 1 + 1 + 2 + 2),
        ("koala-1b", "residual", 1 + 1 + 2 + 2 + 2),
        ("koala-700m", "last", 4),
        ("koala-1b", "last", 5),
        ("koala-1b", "none", 0),
    ],
)
def test_each_place_gives_its_pairs(layout: str, place: str, count: int) -> None:
    line = planned(layout=layout)
    with torch.device("meta"):
        network, whole = (UNet2DConditionModel.from_config(unet_config(one)) for one in (line.student, line.teacher))
    found = features.pairs(line, LossTable.model_validate({"place": place}))
    assert len(found) == len(set(found)) == count
    for pair in found:
        assert type(network.get_submodule(pair.student)) is type(whole.get_submodule(pair.teacher))
        assert pair.student.startswith(pair.stage)
        assert pair.teacher.startswith(pair.stage)


def test_a_pair_names_the_teachers_module_by_the_lineage() -> None:
    line = planned(layout="koala-700m", transformers="even")
    found = {pair.student: pair.teacher for pair in features.pairs(line, LossTable(place="self-attention"))}
    assert found["down_blocks.2.attentions.0.transformer_blocks.1.attn1"] == (
        "down_blocks.2.attentions.0.transformer_blocks.2.attn1"
    )
    assert found["up_blocks.0.attentions.1.transformer_blocks.4.attn1"] == (
        "up_blocks.0.attentions.2.transformer_blocks.9.attn1"
    )
    residual = {pair.student: pair.teacher for pair in features.pairs(line, LossTable(place="residual"))}
    assert residual["up_blocks.1.resnets.1"] == "up_blocks.1.resnets.2"
    assert residual["up_blocks.1.resnets.0"] == "up_blocks.1.resnets.0"


def test_stages_choose_and_unknown_ones_are_named() -> None:
    line = planned(layout="koala-700m")
    found = features.pairs(line, LossTable(stages=("up_blocks.1",)))
    assert {pair.stage for pair in found} == {"up_blocks.1"}
    assert len(found) == 4
    for table in (LossTable(stages=("up_blocks.3",)), LossTable(stage_weights={"up_blocks.3": 1.0})):
        with pytest.raises(
            UserError, match=r"up_blocks\.3 is not a stage of the teacher; expected some of down_blocks\.0,"
        ):
            features.pairs(line, table)
    for stages in (("mid_block",), ("down_blocks.0",), ()):
        with pytest.raises(UserError, match=r"^loss\.stages: the student has no self-attention"):
            features.pairs(line, LossTable(stages=stages))
    assert features.pairs(line, LossTable(feature=0.0)) == ()


def batch(count: int = 2) -> State:
    """What the cache gives, at 64 pixels."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (4, 8, 8), "context": (77, SDXL_TINY.context), "pooled": (SDXL_TINY.pooled,)}
    drawn = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
    return drawn | {"ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * count)}


def objective(teacher: UNet2DConditionModel, network: nn.Module, line: Lineage, table: LossTable) -> Objective:
    pairs = features.pairs(line, table)
    return Objective(
        table=table,
        dropout=0.5,
        noise=DDPMScheduler.from_config(dict(reference.SCHEDULER_CONFIG)),
        teacher=teacher,
        pairs=pairs,
        teacher_features=features.FeatureRecorder(teacher, (pair.teacher for pair in pairs)),
        student_features=features.FeatureRecorder(network, (pair.student for pair in pairs)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_teacher_and_student_are_told_the_same_sizes(
    teacher: UNet2DConditionModel, weights: State, dtype: torch.dtype
) -> None:
    """bf16 would round 1365 x 2047 to 1368 x 2048, and fp16 has no odd numbers above 2048."""
    line, told = planned(), list[torch.Tensor]()
    master = distill_student.teacher(weights).to(dtype)
    network = student.build(line, "teacher", teacher, seed=0)
    for one in (master, network):
        one.add_time_proj.register_forward_hook(lambda _, given, embedded: told.extend((*given, embedded)))
    sizes = torch.tensor([[1365.0, 2047, 3, 517, 1365, 2047], [4095, 3001, 0, 1, 64, 64]])
    made = objective(master, network, line, LossTable())
    with torch.no_grad():
        made.errors(network, batch() | {"ids": sizes}, torch.Generator().manual_seed(0))
    (teachers, embedded), (students, like) = told[:2], told[2:]
    assert torch.equal(teachers.float(), sizes.flatten())
    assert torch.equal(students.float(), sizes.flatten())
    assert embedded.dtype == like.dtype == torch.float32
    assert torch.equal(embedded, like)


@pytest.mark.parametrize("place", ["self-attention", "last"])
def test_gradient_checkpointing_changes_no_gradient(teacher: UNet2DConditionModel, place: config.Place) -> None:
    line, table = planned(), LossTable(place=place, task=0, output=0)
    gradients, passes = [], []
    for checkpointing in (False, True):
        network = student.build(line, "teacher", teacher, seed=0)
        ran: list[str] = []
        attention = network.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1")
        attention.register_forward_hook(lambda *_, ran=ran: ran.append("forward"))
        if checkpointing:
            network.enable_gradient_checkpointing()
        found = objective(teacher, network, line, table).errors(network, batch(), torch.Generator().manual_seed(0))
        losses.total(table, found).backward()
        passes.append(len(ran))
        gradients.append({name: one.grad for name, one in network.named_parameters() if one.grad is not None})
    assert passes == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_recorder_keeps_nothing_outside_of_recording() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    recorder = features.FeatureRecorder(network, ["0"])
    with recorder.recording() as taken:
        network(torch.ones(1, 2))
    first = taken["0"]
    network(torch.zeros(1, 2))
    assert taken["0"] is first
    assert list(taken) == ["0"]
    with pytest.raises(ZeroDivisionError), recorder.recording():
        1 / 0  # noqa: B018
    network(torch.zeros(1, 2))
    assert taken["0"] is first


# --- losses ------------------------------------------------------------------------------------------------------


def test_a_student_that_is_its_teacher_has_no_error(teacher: UNet2DConditionModel) -> None:
    whole = {"down": [list(stage) for stage in SDXL.down], "up": [list(stage) for stage in SDXL.up], "middle": 10}
    line, table = planned(layout=whole), LossTable()
    network = student.build(line, "teacher", teacher, seed=0).eval()
    made = objective(teacher, network, line, table)
    with torch.no_grad():
        found = made.errors(network, batch(), torch.Generator().manual_seed(0))
        compact = student.build(planned(), "teacher", teacher, seed=0).eval()
        other = objective(teacher, compact, planned(), table).errors(compact, batch(), torch.Generator().manual_seed(0))
    # squares of rounding alone: how a sum is rounded depends on where the arrays lie in memory
    assert max(float(found["output"]), float(found["feature"])) < 1e-9
    assert float(found["task"]) > 0.5  # random weights do not know the noise
    assert float(other["output"]) > 1e-4
    assert float(other["feature"]) > 1e-4


PAIRS = (
    features.Pair("down_blocks.1", "s1", "t1"),
    features.Pair("mid_block", "s2", "t2"),
)
STUDENT = {"s1": torch.tensor([1.0, 2.0]), "s2": torch.tensor([[3.0], [1.0]])}
TEACHER = {"t1": torch.tensor([0.0, 4.0]), "t2": torch.tensor([[1.0], [1.0]]).bfloat16()}
# squared errors: (1 + 4) / 2 and (4 + 0) / 2; mean squares of the teacher's: 16 / 2 and 1


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (LossTable(), 2.5 + 2),
        (LossTable(stage_weights={"mid_block": 3.0}), 2.5 + 3 * 2),
        (LossTable(stage_weights={"mid_block": 0.0}), 2.5),
        (LossTable(normalise=True), 2.5 / 8 + 2 / 1),
        (LossTable(normalise=True, stage_weights={"down_blocks.1": 4.0}), 4 * 2.5 / 8 + 2),
    ],
)
def test_the_feature_error_is_what_it_is_by_hand(table: LossTable, expected: float) -> None:
    assert float(losses.feature_error(table, PAIRS, STUDENT, TEACHER)) == pytest.approx(expected)


def test_a_feature_of_zeros_divides_by_no_zero() -> None:
    found = losses.feature_error(LossTable(normalise=True), PAIRS[:1], STUDENT, {"t1": torch.zeros(2)})
    assert found.isfinite()
    assert float(losses.feature_error(LossTable(), (), {}, {})) == 0


def test_terms_are_weighted_by_picture_and_added_up_by_factor() -> None:
    def filled(*values: float) -> torch.Tensor:
        return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)

    table = LossTable(task=2, output=3, feature=5)
    found = losses.terms(
        table,
        weights=torch.tensor([1.0, 0.5]),
        noise=filled(0, 0),
        student=filled(1, 2),
        teacher=filled(1, 4),
        features=torch.tensor(7.0),
    )
    assert {name: float(value) for name, value in found.items()} == {
        "task": (1 * 1 + 0.5 * 4) / 2,
        "output": (0 + 0.5 * 4) / 2,
        "feature": 7,
    }
    assert float(losses.total(table, found)) == 2 * 1.5 + 3 * 1 + 5 * 7


@pytest.fixture(scope="module")
def schedule() -> DDPMScheduler:
    return DDPMScheduler.from_config(dict(reference.SCHEDULER_CONFIG))


def test_weights_by_time_step_follow_their_formulas(schedule: DDPMScheduler) -> None:
    kept, time = schedule.alphas_cumprod, torch.arange(1000)
    ratio = kept / (1 - kept)
    assert torch.equal(losses.time_weights(LossTable(), schedule, time), torch.ones(1000))
    found = losses.time_weights(LossTable(weighting="min-snr", gamma=5), schedule, time)
    torch.testing.assert_close(found, torch.minimum(ratio, torch.tensor(5.0)) / ratio, rtol=1e-3, atol=1e-5)
    assert found[0] < 0.01
    assert float(found[-1]) == pytest.approx(1)
    assert float(losses.time_weights(LossTable(weighting="min-snr", gamma=1), schedule, time)[300]) < float(found[300])


def test_weights_of_velocity_have_a_mean_of_one(schedule: DDPMScheduler) -> None:
    kept, time = schedule.alphas_cumprod, torch.arange(1000)
    found = losses.time_weights(LossTable(weighting="velocity", most_weight=15), schedule, time)
    assert float(found.mean()) == pytest.approx(1, abs=1e-5)
    assert float(found.max() / found.min()) == pytest.approx(15 * float(kept[0]), rel=1e-3)
    under = 1 / kept < 15
    scaled = found[under] * kept[under]  # as the inverse of alpha_bar, up to one factor
    torch.testing.assert_close(scaled, scaled[0].expand_as(scaled))
    some = torch.tensor([999, 3])
    assert torch.equal(losses.time_weights(LossTable(weighting="velocity"), schedule, some), found[some])


def test_time_steps_are_uniform_and_spread_over_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([losses.time_steps(4, 1000, generator) for _ in range(5000)])
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn // 250, torch.arange(4).expand(5000, 4))  # one of each quarter
    counts = torch.bincount(drawn.flatten() // 10, minlength=100)
    assert (int(counts.min()) > 120, int(counts.max()) < 280) == (True, True)  # 200 each, of 20,000
    assert (int(drawn.min()), int(drawn.max())) == (0, 999)
    alone = torch.cat([losses.time_steps(1, 1000, generator) for _ in range(5000)])
    assert float(alone.float().mean()) == pytest.approx(499.5, abs=20)
