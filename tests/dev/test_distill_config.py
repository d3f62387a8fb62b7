"""A distillation's file: its keys, its paths, and one line for each fault."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from koala_sdxl.distill import config
from koala_sdxl.distill.config import Config, StudentTable
from koala_sdxl.distill.errors import UserError
from tools.harness.testhost import ROOT

EXAMPLE = ROOT / "distill" / "example.toml"
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


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, "utf-8")
    return path


def given(**tables: str) -> str:
    """The file with further lines at the end of tables; `top` for those of none."""
    text = GIVEN
    for table in ("student", "loss", "steps", "log"):
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


def test_the_example_of_a_step_distillation_is_valid() -> None:
    found = config.read(ROOT / "distill" / "lightning.toml")
    assert (found.steps.student, found.steps.teacher, found.variant) == (8, 3, "lightning")


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
        ({"steps": "student = 51"}, "steps.student = 51 cannot be used: Input should be less than or equal to 50"),
        ({"steps": "teacher = 0"}, "steps.teacher = 0 cannot be used: Input should be greater than 0"),
        ({"training": "betas = [0.9]"}, "training.betas.1 is missing"),
        ({"loss": 'stage_weights = { "mid_block" = -1.0 }'}, "loss.stage_weights.mid_block = -1.0 cannot be used"),
        ({"log": "to = ['aim']"}, "log.to.0 = 'aim' cannot be used: Input should be 'csv', 'tensorboard' or 'wandb'"),
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


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GIVEN.encode())
    assert config.read(path) == config.read(written(tmp_path, GIVEN))


@pytest.mark.parametrize(("key", "name"), [("output", "out"), ("data.cache", "cache")])
@pytest.mark.parametrize("below", ["", "/deeper/down"])
def test_a_file_where_a_folder_is_wanted_is_named(tmp_path: Path, key: str, name: str, below: str) -> None:
    (tmp_path / name).write_text("mine")
    text = GIVEN.replace(f'"{name}"', f'"{name}{below}"')
    folder = str(tmp_path / f"{name}{below}")
    said = f"{key} = {folder!r} cannot be a folder: {tmp_path / name} is a file. Change it."
    assert faults(tmp_path, text) == [said]
