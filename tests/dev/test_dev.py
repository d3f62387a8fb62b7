"""The command line, as a newcomer meets it: before anything is built."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.commands import COMMANDS, parser
from tools.harness.testhost import ROOT


def run(tmp_path: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run dev.py with an empty cache and no packages, in another folder than the checkout."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "80"}
    command = [python, "-S", str(ROOT / "dev.py"), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_own_help_and_builds_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = run(tmp_path, name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: dev.py {name} ")
    assert done.stdout == parser(name).format_help()
    assert not (tmp_path / "cache").exists()


def test_help_lists_every_command(tmp_path: Path) -> None:
    lines = run(tmp_path, "--help").stdout.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("    ") and line.strip()} >= COMMANDS.keys()


def test_a_command_names_a_function_that_there_is() -> None:
    for command in COMMANDS.values():
        module, function = command.function.split(":")
        assert importlib.util.find_spec(module), module
        source = Path(str(importlib.util.find_spec(module).origin)).read_text("utf-8")  # type: ignore[union-attr]
        assert f"def {function}(" in source


@pytest.mark.parametrize("arguments", [[], ["demo", "--promt", "x"], ["paint"], ["lineage", "one"], ["bench", "speed"]])
def test_a_mistyped_command_builds_nothing(tmp_path: Path, arguments: list[str]) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("dev.py")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_an_old_python_is_told_which_one_is_needed(tmp_path: Path) -> None:
    found = (shutil.which(f"python3.{minor}") for minor in (10, 9, 8, 7, 6))
    # a version manager's name for a Python that is switched off is found, too, but does not run
    working = (name for name in found if name and not subprocess.run([name, "-V"], capture_output=True).returncode)
    python = next(working, None)
    if python is None:
        pytest.skip("no old Python here")
    done = run(tmp_path, "demo", python=python)
    assert done.returncode == 1
    assert "3.11 or newer is needed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_without_room_is_told_in_one_line(tmp_path: Path) -> None:
    small = "from tools.harness import testhost; import dataclasses, dev; "
    small += "testhost.FULL = dataclasses.replace(testhost.FULL, gigabytes=10**6); raise SystemExit(dev.main(['demo']))"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", small], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("dev.py: ")
    assert "1000000 GB needed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
