"""A distillation's parts that need no run: its file, the student cut out of the teacher, features, losses, metrics."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from koala_sdxl.distill import config, features, losses, student, train
from koala_sdxl.distill.config import Config, LossTable, StudentTable, TrainingTable
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.metrics import CsvTracker, Means
from koala_sdxl.distill.objective import Objective
from koala_sdxl.koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, KOALA_TINY, SDXL
from koala_sdxl.koala.architecture.lineage import KEPT_TRANSFORMERS, Lineage, at_widths_of, lineage
from koala_sdxl.koala.files.export import unet_config
from tools.harness.testhost import ROOT
from tools.measure import reference
from tools.synthetic.random_weights import unet_state
from tools.tiny.train import SDXL_TINY

State = dict[str, torch.Tensor]
EXAMPLE = ROOT / "distill" / "example.toml"
WHOLE_LAYERS = {"down": [[0, 0], [2, 2], [4, 4]], "up": [[4, 4, 4], [2, 2, 2], [0, 0, 0]], "middle": 4}
GIVEN = """
output = "out"
[teacher]
model = "sdxl"
[data]
path = "pictures"
cache = "cache"
[training]
steps = 3
"""
"""The keys without a default."""


# --- the file ----------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, "utf-8")
    return path


def given(**tables: str) -> str:
    """The file with further lines at the end of tables; `top` for those of none."""
    text = GIVEN
    for table in ("student", "loss", "log"):
        text += f"[{table}]\n"
    for table, lines in tables.items():
        text = f"{lines}\n{text}" if table == "top" else text.replace(f"[{table}]\n", f"[{table}]\n{lines}\n")
    return text


def faults(folder: Path, text: str) -> list[str]:
    """What is said of a file, line by line, without its name."""
    path = written(folder, text)
    with pytest.raises(UserError) as problem:
        config.read(path)
    lines = str(problem.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def shown_defaults() -> dict[str, dict[str, Any]]:
    """The example's lines that begin with #: table -> key -> value, of several lines for a key the first."""
    found: dict[str, dict[str, Any]] = {"": {}}
    table = ""
    for line in EXAMPLE.read_text("utf-8").splitlines():
        if head := re.fullmatch(r"\[(\w+)\]", line):
            table = head[1]
            found[table] = {}
        elif (shown := re.match(r"# (\w+) = ", line)) and shown[1] not in found[table]:
            found[table] |= tomllib.loads(line.removeprefix("# "))
    return found


def test_the_example_shows_every_key_and_its_default() -> None:
    active, shown = tomllib.loads(EXAMPLE.read_text("utf-8")), shown_defaults()
    assert [name for name in config.keys_of() if name not in active] == []
    for table in config.keys_of():
        if table == "output":
            continue
        fields = Config.model_fields[table].annotation.model_fields  # type: ignore[union-attr]
        assert list(shown[table]) == [name for name in fields if not fields[name].is_required()], table
        assert set(active[table]) == {name for name in fields if fields[name].is_required()}, table
    bare = {table: {**active[table], **shown[table]} for table in config.keys_of() if table != "output"}
    assert Config.model_validate({"output": "out", **bare}) == Config.model_validate(active | {"output": "out"})


def test_the_example_is_valid_and_its_paths_count_from_its_folder() -> None:
    found = config.read(EXAMPLE)
    here = EXAMPLE.parent
    paths = (found.output, found.teacher.model, found.data.path, found.data.cache)
    assert paths == tuple(
        here / name for name in ("koala-700m-of-mine", "stable-diffusion-xl-base-1.0", "pictures", "pictures-cache")
    )
    assert found.student == StudentTable()


def test_paths_count_from_the_files_folder_and_words_are_no_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = given().replace('"pictures"', '"~/pictures"').replace('"cache"', '"/var/cache"')
    found = config.read(written(tmp_path, text))
    assert (found.output, found.teacher.model) == (tmp_path / "out", tmp_path / "sdxl")
    assert (found.data.path, found.data.cache) == (Path("/home/me/pictures"), Path("/var/cache"))
    assert found.student.start == "teacher"
    assert config.read(written(tmp_path, given(student='start = "random"'))).student.start == "random"
    assert config.read(written(tmp_path, given(student='start = "mine"'))).student.start == tmp_path / "mine"


def test_a_layout_and_its_transformers_may_be_tables(tmp_path: Path) -> None:
    text = given(
        student="layout = { down = [[0], [1], [2]], up = [[2, 2], [1, 1], [0, 0]] }\n"
        'transformers = { "down_blocks.1.attentions.0" = [1] }'
    )
    found = config.read(written(tmp_path, text)).student
    assert isinstance(found.layout, config.CustomLayout)
    assert (found.layout.down, found.layout.middle) == (((0,), (1,), (2,)), None)
    assert found.transformers == {"down_blocks.1.attentions.0": (1,)}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"training": "learning_rat = 1.0"}, "training.learning_rat is not a known key; did you mean lear"),
        ({"top": "outputs = 1"}, "outputs is not a known key; did you mean output?"),
        ({"loss": "qqq = 1"}, "loss.qqq is not a known key; known keys: task, output, feature, "),
        ({"data": "resolution = 'big'"}, "data.resolution = 'big' cannot be used: Input should be a valid integer"),
        ({"training": "batch = '4'"}, "training.batch = '4' cannot be used: Input should be a valid integer"),
        ({"training": "batch = true"}, "training.batch = True cannot be used: Input should be a valid integer"),
        ({"data": "upscale = 'no'"}, "data.upscale = 'no' cannot be used: Input should be a valid boolean"),
        ({"loss": "place = 'attention'"}, "loss.place = 'attention' cannot be used: Input should be 'self-attention'"),
        ({"loss": "task = -1.0"}, "loss.task = -1.0 cannot be used: Input should be greater than or equal to 0"),
        ({"training": "learning_rate = 0.0"}, "training.learning_rate = 0.0 cannot be used: Input should be greater"),
        ({"training": "learning_rate = inf"}, "training.learning_rate = inf cannot be used: Input should be a finite"),
        ({"training": "seed = -1"}, "training.seed = -1 cannot be used: Input should be greater than or equal to 0"),
        ({"training": "betas = [0.9]"}, "training.betas.1 is missing"),
        ({"loss": 'stage_weights = { "mid_block" = -1.0 }'}, "loss.stage_weights.mid_block = -1.0 cannot be used"),
        ({"log": "to = ['wandb']"}, "log.to.0 = 'wandb' cannot be used: Input should be 'csv' or 'tensorboard'"),
        (
            {"student": "layout = 'koala-800m'"},
            "student.layout = 'koala-800m' cannot be used: Input should be 'koala-700m', 'koala-1b' or 'koala-1.7b' "
            "(the compact U-Net: a name, or a table with down, up and middle). Change it.",
        ),
        ({"student": "layout = 700"}, "student.layout = 700 cannot be used: Input should be 'koala-700m'"),
        ({"student": "layout = { down = [[0], [1], [2]] }"}, "student.layout.up is missing; it has no default."),
        (
            {"student": "layout = { down = [[0], [1], [2]], up = [[2, 2], [1, 1], [0, 0]], mid = 2 }"},
            "student.layout.mid is not a known key; did you mean middle?",
        ),
        (
            {"student": "layout = { down = [[0], [-1], [2]], up = [[2, 2], [1, 1], [0, 0]] }"},
            "student.layout.down.1.0 = -1 cannot be used",
        ),
        ({"student": "transformers = 'last'"}, "student.transformers = 'last' cannot be used: Input should be 'first'"),
        ({"student": "transformers = [0, 1]"}, "student.transformers = [0, 1] cannot be used: Input should be 'first'"),
        (
            {"student": "transformers = { 'mid_block.attentions.0' = ['a'] }"},
            "student.transformers.mid_block.attentions.0.0 = 'a' cannot be used: Input should be a valid integer",
        ),
        ({"student": "start = 3"}, "student.start = 3 cannot be used: Input should be 'teacher' or 'random' (initial "),
        ({"student": "start = { path = 'x' }"}, "student.start = {'path': 'x'} cannot be used: Input should be a "),
    ],
)  # fmt: skip
def test_one_fault_is_one_line_that_begins_with_the_key(tmp_path: Path, tables: dict[str, str], said: str) -> None:
    lines = faults(tmp_path, given(**tables))
    assert len(lines) == 1
    assert lines[0].startswith(said)
    for internal in ("CustomLayout", "literal[", "dict[", "Table", "pydantic"):
        assert internal not in lines[0]


def test_every_fault_is_told(tmp_path: Path) -> None:
    assert faults(tmp_path, 'student = 3\noutput = "out"\n') == [
        "teacher is missing; it has no default. Add it.",
        "student = 3 cannot be used: Input should be a table. Change it.",
        "data is missing; it has no default. Add it.",
        "training is missing; it has no default. Add it.",
    ]
    assert faults(tmp_path, given().replace('model = "sdxl"', "").replace("steps = 3", "")) == [
        "teacher.model is missing; it has no default. Add it.",
        "training.steps is missing; it has no default. Add it.",
    ]


def test_what_is_no_toml_is_named(tmp_path: Path) -> None:
    for content in (b"output = ", b"\xff\xfe"):
        (tmp_path / "run.toml").write_bytes(content)
        with pytest.raises(UserError, match=r"run\.toml is not a TOML file: .*See distill/example\.toml"):
            config.read(tmp_path / "run.toml")
    with pytest.raises(UserError, match=r"nowhere\.toml cannot be read \(No such file or directory\)"):
        config.read(tmp_path / "nowhere.toml")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        config.read(tmp_path)


# --- the student -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> State:
    """A random SDXL as wide as koala-tiny."""
    return {name: tensor.float() for name, tensor in unet_state(SDXL_TINY).items()}


@pytest.fixture(scope="module")
def teacher(weights: State) -> UNet2DConditionModel:
    network = UNet2DConditionModel.from_config(unet_config(SDXL_TINY))
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def planned(**table: Any) -> Lineage:
    return student.plan(StudentTable.model_validate(table), SDXL_TINY)


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
    assert (float(found["output"]), float(found["feature"])) == (0, 0)
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


# --- rate and metrics --------------------------------------------------------------------------------------------


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    table = TrainingTable(steps=1000, warmup=10, final_rate=0.1)
    rates = [train.rate(table, step) for step in range(1000)]
    assert rates[:9] == pytest.approx([(step + 1) / 10 for step in range(9)], rel=1e-3)
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert train.rate(table, 500) == pytest.approx((1 + 0.1) / 2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert train.rate(TrainingTable(steps=5, warmup=0, final_rate=1.0), 0) == 1
    assert {train.rate(TrainingTable(steps=5, warmup=0, final_rate=1.0), step) for step in range(5)} == {1}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_means_begin_anew_after_a_row_and_resume_from_a_checkpoint(accelerator: Accelerator) -> None:
    means, later = Means(), Means()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value), "task": torch.tensor(2 * value)}, accelerator)
    later.load_state_dict(means.state_dict())
    later.add({"loss": torch.tensor(7.0), "task": torch.tensor(0.0)}, accelerator)
    assert means.take() == {"loss": 3, "task": 6}
    assert later.take() == {"loss": 4, "task": 4.5}
    means.add({"loss": torch.tensor(5.0)}, accelerator)
    assert means.take() == {"loss": 5}


def test_a_run_that_goes_on_drops_the_rows_after_its_checkpoint(tmp_path: Path, accelerator: Accelerator) -> None:
    path = tmp_path / "metrics.csv"
    CsvTracker(path).resume_from(0)
    assert not path.exists()
    for step in (1, 2, 9, 10):
        CsvTracker(path).log({"loss": step / 2, "rate": 1}, step=step)
    assert path.read_text().splitlines() == ["step,loss,rate", "1,0.5,1", "2,1.0,1", "9,4.5,1", "10,5.0,1"]
    CsvTracker(path).resume_from(9)
    assert path.read_text().splitlines() == ["step,loss,rate", "1,0.5,1", "2,1.0,1", "9,4.5,1"]
    CsvTracker(path).resume_from(0)
    CsvTracker(path).log({"loss": 3.0, "rate": 1}, step=1)
    assert path.read_text().splitlines() == ["step,loss,rate", "1,3.0,1"]


def test_metrics_that_a_killed_run_left_empty_are_begun_anew(tmp_path: Path, accelerator: Accelerator) -> None:
    path = tmp_path / "metrics.csv"
    path.touch()
    CsvTracker(path).resume_from(4)
    CsvTracker(path).log({"loss": 3.0}, step=5)
    assert path.read_text().splitlines() == ["step,loss", "5,3.0"]
