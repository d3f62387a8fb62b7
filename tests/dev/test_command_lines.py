"""Nonsense on the command line: one line that says what was found and what was expected, and nothing has begun."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dev
from tools.commands import COMMANDS, MOST_SEED, MOST_STEPS
from tools.harness.testhost import ROOT

CARRY = "lora --teacher sdxl --student koala --prompts words --out new"
WRONG = {
    "demo": [
        ("--port 99999", "--port: 99999: expected a whole number from 1 to 65535"),
        ("--port 0", "--port: 0: expected a whole number from 1 to 65535"),
        ("--port -1", "--port: -1: expected a whole number from 1 to 65535"),
        ("--port http", "--port: http: expected a whole number from 1 to 65535"),
        ("--port {taken}", "--port: Port {taken} cannot be used"),
        ("--steps 0", "--steps: 0: expected a whole number from 1 to 1000"),
        ("--steps 1001", "--steps: 1001: expected"),
        ("--steps 2.5", "--steps: 2.5: expected"),
        ("--steps nan", "--steps: nan: expected"),
        ("--seed -1", "--seed: -1: expected a whole number from 0 to 18446744073709551615"),
        ("--seed 18446744073709551616", "--seed: 18446744073709551616: expected"),
        ("--model /nope", "--model: /nope: expected a KOALA folder or .safetensors file; there is nothing"),
        ("--model ''", "--model: an empty name: expected a KOALA folder"),
        ("--model {long}", "expected a KOALA folder or .safetensors file; there is nothing"),
        ("--out {file}", "--out: {file}: expected a folder, or a name that ends in .png"),
        ("--out {picture}", "--out: {picture}: expected a new file; this one exists already"),
        ("--out {folder.png}", "--out: {folder.png}: expected a file to write; this is a folder"),
        ("--out {file}/in/it", "--out: {file}/in/it: expected a place that can be written to (Not a directory)"),
        ("--out {file}/it.png", "--out: {file}/it.png: expected a place that can be written to (Not a directory)"),
        ("--out /proc/1/fd/mine", "--out: /proc/1/fd/mine: expected a place that can be written to"),
        ("--out {long}", "expected a place that can be written to (File name too long)"),
        ("--comfyui /nope", "--comfyui: /nope: no ComfyUI here"),
        ("--comfyui {folder}", "--comfyui: {folder}: no ComfyUI here"),
        ("--promt x", "unrecognized arguments: --promt x"),
        ("--seed", "--seed: expected one argument"),
        ("a koala", "unrecognized arguments: a koala"),
    ],
    "serve": [
        ("--port 65536", "--port: 65536: expected a whole number from 1 to 65535"),
        ("--port {taken}", "--port: Port {taken} cannot be used"),
        ("--comfyui {file}", "--comfyui: {file}: no ComfyUI here"),
    ],
    "check": [("everything", "unrecognized arguments: everything")],
    "parity": [("--quick", "unrecognized arguments: --quick")],
    "transfer": [("docs", "unrecognized arguments: docs")],
    "generate": [("nosuch", "WHAT: nosuch: expected one of workflows, blueprints, locales")],
    "lineage": [
        ("{file}", "the following arguments are required: KOALA"),
        ("/nope {file}", "SDXL: /nope: expected a .safetensors file or a Hugging Face folder; there is nothing"),
        ("{file} /nope", "KOALA: /nope: expected"),
        ("{file} {file} --out {folder}", "--out: {folder}: expected a file to write; this is a folder"),
    ],
    "bench": [
        ("nosuch", "SECTION: nosuch: expected one of machine, macs, load"),
        ("--repeats 0", "--repeats: 0: expected a whole number of 1 or more"),
        ("--repeats many", "--repeats: many: expected a whole number of 1 or more"),
        ("--device tpu", "--device: invalid choice: 'tpu' (choose from"),
        ("search --full 0", "--full: 0: expected a whole number of 1 or more"),
    ],
    "fuzz": [
        ("--cases 0", "--cases: 0: expected a whole number of 1 or more"),
        ("--seed -1", "--seed: -1: expected a whole number of 0 or more"),
        ("--only first", "--only: first: expected a whole number of 0 or more"),
    ],
    "nodes": [("--reprot", "unrecognized arguments: --reprot")],
    "soak": [("--prompts 0", "--prompts: 0: expected a whole number of 1 or more")],
    "train-tiny": [
        ("--work {file}", "--work: {file}: expected a folder; this is a file"),
        ("--tokenizer /nope", "--tokenizer: /nope: expected a folder with CLIP's tokenizer; there is nothing"),
        ("--tokenizer {folder}", "--tokenizer: {folder}: expected a folder with CLIP's tokenizer; this is a folder"),
        ("--tokenizer {file}", "--tokenizer: {file}: expected a folder with CLIP's tokenizer; this is a file"),
    ],
    "pack-tiny": [
        ("", "the following arguments are required: --model"),
        ("--model {file}", "--model: {file}: expected koala-tiny's diffusers folder; this is a file"),
        ("--model {folder} --out {folder}", "--out: {folder}: expected a file to write; this is a folder"),
        ("--model {folder} --out ''", "--out: an empty name: expected a file to write"),
    ],
    "evaluate-tiny": [
        ("--model {folder}", "--model: {folder}: expected koala-tiny's file; this is a folder"),
        ("--card {folder}", "--card: {folder}: expected a file to write; this is a folder"),
    ],
    "batch": [
        ("", "the following arguments are required: WORKFLOW, --out"),
        ("/nope --out {folder}", "WORKFLOW: /nope: expected a file; there is nothing here"),
        ("{file} {folder} --out {folder}", "TABLE: {folder}: expected a file; this is a folder"),
        ("{file} --out {folder} --workers 0", "--workers: 0: expected a whole number of 1 or more"),
        ("{file} --out {folder} --per-gpu 0", "--per-gpu: 0: expected a whole number of 1 or more"),
        ("{file} --out {folder} --limit some", "--limit: some: expected a whole number of 1 or more"),
    ],
    "batch-bench": [("nosuch", "SECTION: nosuch: expected one of overhead, scale")],
    "distill": [("", "the following arguments are required: CONFIG.toml")],
    "carry": [
        ("", "the following arguments are required: LORA, --teacher, --student, --prompts, --out"),
        (f"{CARRY} --rank 0", "--rank: 0: expected a whole number, 1 or more"),
        (f"{CARRY} --size 100", "--size: 100: expected a multiple of 8, 64 or more"),
        (f"{CARRY} --samples few", "--samples: few: expected a whole number, 8 or more"),
        (f"{CARRY} --draw-steps 0", "--draw-steps: 0: expected a whole number, 1 to 1000"),
        (f"{CARRY} --draw-steps 1001", "--draw-steps: 1001: expected a whole number, 1 to 1000"),
        (f"{CARRY} --cfg 0.5", "--cfg: 0.5: expected a number, 1 (no guidance) or more"),
        (f"{CARRY} --cfg nan", "--cfg: nan: expected a number, 1 (no guidance) or more"),
        (f"{CARRY} --spacing linspace", "--spacing: invalid choice: 'linspace'"),
        (f"{CARRY} --method both", "--method: invalid choice: 'both'"),
    ],
    "distill-study": [
        ("--jobs -1", "--jobs: -1: expected a whole number of 0 or more"),
        ("--only nosuch", "--only: nosuch: expected one of curve, place, layers, addons, steps"),
        ("--work {file}", "--work: {file}: expected a folder; this is a file"),
    ],
}
"""Command -> arguments, and what is said of them."""
CASES = [(command, words, said) for command, cases in WRONG.items() for words, said in cases]


def test_every_command_has_its_cases() -> None:
    assert {name for name, command in COMMANDS.items() if not command.passes_on} == WRONG.keys()


@pytest.fixture(scope="module")
def taken() -> Any:
    """A port that is in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def names(tmp_path: Path, taken: int) -> dict[str, str]:
    """What stands for the names in braces."""
    for name in ("folder", "folder.png"):
        (tmp_path / name).mkdir()
    for name in ("file", "picture.png"):
        (tmp_path / name).write_text("mine")
    paths = {"folder": "folder", "folder.png": "folder.png", "file": "file", "picture": "picture.png"}
    return {"taken": str(taken), "long": "x" * 300, **{key: str(tmp_path / name) for key, name in paths.items()}}


def filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """dev.py in another folder, with an empty cache: whatever it begins would be seen there."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "COMFYUI_PATH": "", **variables}
    command = [sys.executable, "-S", str(ROOT / "dev.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("command", "words", "said"), CASES, ids=[f"{one} {words}" for one, words, _ in CASES])
def test_nonsense_is_named_in_one_line(
    tmp_path: Path, names: dict[str, str], command: str, words: str, said: str
) -> None:
    before = sorted(tmp_path.iterdir())
    arguments = ["" if word == "''" else filled(word, names) for word in words.split()]
    done = run(tmp_path, command, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("dev.py")
    assert filled(said, names) in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["/nope", "{folder}", "{file}"])
def test_a_python_that_is_none_is_named(tmp_path: Path, names: dict[str, str], name: str) -> None:
    python = filled(name, names)
    for options in ([], ["--comfyui", str(ROOT)]):
        done = run(tmp_path, "demo", *options, COMFYUI_PYTHON=python)
        assert done.returncode in (1, 2)
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "cache").exists()
        if not options:
            assert done.stderr.startswith(f"dev.py: COMFYUI_PYTHON is {python}, which is no program that can be run")


def test_a_variable_with_a_wrong_folder_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", COMFYUI_PATH="/nope")
    assert done.returncode == 2
    assert "/nope: no ComfyUI here" in done.stderr
    assert "(from COMFYUI_PATH)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve"], "koala-demo cannot be made (File exists)"),
        (["demo"], "koala-demo is a file that is not named .png"),
        (["demo", "--model", "koala-demo"], "koala-demo"),
        (["test", "tests/nosuch"], "tests/nosuch: no such test"),
        (["test", "-k", "a/b", "tests/unit/test_nosuch.py::test_it"], "tests/unit/test_nosuch.py::test_it: no such"),
        (["bench", "search"], "--full N goes with search"),
        (["bench", "step", "--full", "9"], "--full N goes with search"),
        (["bench", "step", "report"], "step report: expected report by itself"),
        (["bench", "step", "search", "--full", "9"], "step search: expected search by itself"),
        (["bench", "search", "--full", "999"], "--full 999; expected"),
        (["bench", "search", "--full", "9", "--sampler", "nosuch"], "--sampler nosuch; expected one of euler"),
        (["distill", "nosuch.toml"], "nosuch.toml cannot be read (No such file or directory)"),
        (["distill", "."], ". cannot be read (Is a directory)"),
        (["distill", "koala-demo"], "koala-demo is not a TOML file"),
        (["lineage", "koala-demo", "koala-demo"], "koala-demo"),
        (["carry", *CARRY.split()], "--out: new: expected a name that ends in .safetensors"),
        (["carry", *CARRY.split(), "--out", "a/b.safetensors"], "--out: a is not a folder; expected one to write"),
        (["carry", *CARRY.split(), "--out", "new.safetensors"], "--prompts: words cannot be read (No such file"),
        (
            ["carry", *CARRY.split(), "--prompts", "koala-demo", "--out", "new.safetensors"],
            "--prompts: koala-demo has 1 prompts; expected at least 4",
        ),
        (["pack-tiny", "--model", "empty", "--out", "mine"], "empty"),
        (["evaluate-tiny", "--model", "koala-demo"], "koala-demo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_only_the_environment_can_tell_is_one_line_too(
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "koala-demo").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", "")
    with contextlib.suppress(SystemExit):
        assert dev.main(arguments) == 1
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1, shown.err
    assert said in shown.err
    assert shown.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "koala-demo"]


def test_steps_and_seeds_are_the_samplers(object_info: dict[str, Any]) -> None:
    node = object_info["KoalaSampler"]["input"]["required"]
    assert (node["seed"][1]["min"], node["seed"][1]["max"]) == (0, MOST_SEED)
    custom = next(option for option in node["preset"][1]["options"] if option["key"] == "custom")
    assert (custom["inputs"]["required"]["steps"][1]["min"], MOST_STEPS) == (1, MOST_STEPS)
    assert custom["inputs"]["required"]["steps"][1]["max"] == MOST_STEPS
