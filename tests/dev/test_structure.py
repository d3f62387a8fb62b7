"""`dev.py check`: what it finds in made-up imports and files, and that no module has two names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.check import structure
from tools.harness.testhost import ROOT

EVERY_COMMAND = """
import importlib, json, sys
from tools import commands
for command in commands.COMMANDS.values():
    if command.environment is None:  # the others need what is not here
        importlib.import_module(command.function.split(":")[0])
files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
print(json.dumps({name: file for name, file in files.items() if file}))
"""


def test_imports_between_packages_are_told() -> None:
    imports = {
        "tools": [],
        "tools.demo": ["tools.harness.server"],
        "tools.harness": [],
        "tools.harness.server": ["tools.harness.pack"],
        "tools.harness.pack": [],
    }
    assert structure.packages(imports) == {
        "tools": set(),
        "tools.demo": {"tools.harness"},
        "tools.harness": set(),
    }


@pytest.mark.parametrize(
    ("imports", "circles"),
    [
        ({"a.b": ["a.c"], "a.c": ["a.d"], "a.d": []}, []),
        ({"a.b": ["a.c"], "a.c": ["a.b"]}, [("a.b", "a.c")]),
        ({"a.b.x": ["a.c.x"], "a.c.y": ["a.b.y"]}, [("a.b", "a.c")]),  # no module twice, but the packages
        ({"a.b": ["a.c"], "a.c": ["a.d"], "a.d": ["a.b"]}, [("a.b", "a.c", "a.d")]),
        ({"a": ["a.b"], "a.b": ["a"]}, [("a.__init__", "a.b")]),
        ({"a": ["a.b"], "a.b": []}, []),
        ({"a.b": ["c.d"], "c.d": ["a.b"]}, []),  # roots
        (
            {"a.b": ["a.c"], "a.c": ["a.b"], "a.d.x": ["a.d.y"], "a.d.y": ["a.d.x"]},
            [("a.b", "a.c"), ("a.d.x", "a.d.y")],
        ),
    ],
)
def test_circles_are_found_at_every_level(imports: dict[str, list[str]], circles: list[tuple[str, ...]]) -> None:
    assert structure.circles(imports) == circles


def test_a_long_python_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "ROOT", tmp_path)
    (tmp_path / "just.py").write_text("x\n" * structure.LONGEST)
    (tmp_path / "over.py").write_text("x\n" * (structure.LONGEST + 1))
    (tmp_path / "over.json").write_text("x\n" * (structure.LONGEST + 1))
    assert structure.too_long(["just.py", "over.py", "over.json"]) == {"over.py": structure.LONGEST + 1}


def test_a_forbidden_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contracts are read and held against the real source: one more import, and they are broken."""
    for name in ("pyproject.toml", "__init__.py", "koala_loader.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("host", "nodes", "distill", "batch", "tools", "tests"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    (tmp_path / "koala").mkdir()
    for path in (ROOT / "koala").iterdir():
        (tmp_path / "koala" / path.name).symlink_to(path)
    (tmp_path / "koala" / "releases.py").unlink()
    (tmp_path / "koala" / "releases.py").write_text("from ..host import model\n")
    monkeypatch.setattr(structure, "ROOT", tmp_path)
    said: list[str] = []
    monkeypatch.setattr(structure, "say", said.append)
    assert structure.layers() == 1
    assert "koala_sdxl.koala.releases -> koala_sdxl.host.model" in said[0]


@pytest.mark.nightly
def test_no_file_is_loaded_under_two_names() -> None:
    """By day mypy refuses a file that it comes upon under two."""
    done = subprocess.run(
        [sys.executable, "-c", EVERY_COMMAND], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    files: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    ours: dict[Path, list[str]] = {}
    for name, file in files.items():
        if Path(file).resolve().is_relative_to(ROOT):
            ours.setdefault(Path(file).resolve(), []).append(name)
    assert len(ours) > 50
    assert {path: names for path, names in ours.items() if len(names) > 1} == {}
