"""What the pack says where ComfyUI is too old, or diffusers is missing, too old or broken: in real, bare Pythons."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from koala_sdxl.koala.requirements import is_older, least
from tools.harness.testhost import ROOT

OLDEST, DIFFUSERS = "0.18.2", "0.30.0"
COMMAND = f"Run {sys.executable} -m pip install -r {ROOT / 'requirements.txt'}, and restart ComfyUI."
IMPORT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location({str(ROOT)!r}, {str(ROOT / "__init__.py")!r})
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(module)
except Exception as error:
    print(type(error).__name__, error, sep=": ")
"""
"""Imports the pack as ComfyUI imports it."""


def said(code: str, *paths: Path, bare: bool = True) -> str:
    """What a Python prints that has these folders and, if ``bare``, no installed packages."""
    done = subprocess.run(
        [sys.executable, *(["-S"] if bare else []), "-c", f"import sys; sys.path[:0] = {[*map(str, paths)]}\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_least_versions_are_those_that_installers_read() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert settings["tool"]["comfy"]["requires-comfyui"] == f">={least('pyproject.toml', 'requires-comfyui')}"
    assert settings["project"]["dependencies"] == [f"diffusers>={least('requirements.txt', 'diffusers')}"]


@pytest.mark.parametrize(
    ("found", "wanted", "older"),
    [
        ("0.16.3", OLDEST, True),
        ("0.18.1", OLDEST, True),
        ("0.18.2", OLDEST, False),
        ("0.18", "0.18.0", False),
        ("0.18.10", OLDEST, False),
        ("1.0.0", OLDEST, False),
        ("0.31.0.dev0", DIFFUSERS, False),
        ("0.30.0rc1", DIFFUSERS, False),
        ("0.29.2", DIFFUSERS, True),
        ("v0.16.3", OLDEST, True),
        ("v0.30.0", OLDEST, False),
        ("nightly", OLDEST, False),
    ],
)
def test_versions_are_compared_by_their_numbers(found: str, wanted: str, older: bool) -> None:
    assert is_older(found, wanted) == older


@pytest.mark.parametrize("version", ["0.16.3", "0.18.1"])
def test_an_older_comfyui_is_named_before_anything_of_it_is_imported(version: str, tmp_path: Path) -> None:
    (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n', "utf-8")
    assert said(IMPORT, tmp_path) == (
        f"RequirementError: this ComfyUI is {version}; KOALA for ComfyUI needs {OLDEST} or newer. Update ComfyUI, "
        "install its requirements.txt again, and restart it."
    )


def test_a_comfyui_from_before_it_had_a_version_is_older() -> None:
    assert said(IMPORT).startswith("RequirementError: this ComfyUI has no version (no comfyui_version")


def test_the_least_comfyui_gets_past_the_check(tmp_path: Path) -> None:
    (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{OLDEST}"\n', "utf-8")
    assert said(IMPORT, tmp_path) == "ModuleNotFoundError: No module named 'comfy_api'"


FAULT = "from koala.requirements import diffusers_fault; print(diffusers_fault())"


def test_a_missing_diffusers_is_named_with_what_to_run() -> None:
    assert said(FAULT) == (
        f"diffusers is not installed; expected diffusers {DIFFUSERS} or newer, from which KOALA's noise levels come. "
        + COMMAND
    )


@pytest.mark.parametrize(("version", "fine"), [("0.29.2", False), ("0.30.0", True), ("0.31.0.dev0", True)])
def test_a_diffusers_that_is_too_old_is_named(version: str, fine: bool, tmp_path: Path) -> None:
    installed = tmp_path / f"diffusers-{version}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: diffusers\nVersion: {version}\n", "utf-8")
    begins = f"diffusers {version} is installed; expected diffusers {DIFFUSERS} or newer"
    assert said(FAULT, tmp_path) == "" if fine else said(FAULT, tmp_path).startswith(begins)


BROKEN = """
from koala.schedule import schedule
try:
    schedule(5, "leading")
except Exception as error:
    print(type(error).__name__, error, sep=": ")
"""


def test_a_diffusers_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    """As one does that wants another transformers than ComfyUI's."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("import no_such_package\n", "utf-8")
    found = said(BROKEN, tmp_path, bare=False)
    assert found.startswith("RequirementError: diffusers 0.")
    assert " cannot be imported (No module named 'no_such_package'); expected diffusers 0.30.0 or newer" in found
    assert found.endswith(COMMAND)


def test_with_diffusers_nothing_is_said() -> None:
    assert said(FAULT, bare=False) == ""
