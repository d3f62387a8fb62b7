"""The registry's zip, made by comfy-cli from a checkout in any state."""

from __future__ import annotations

import io
import re
import subprocess
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tools.harness import pack, testhost
from tools.harness.errors import UserError
from tools.harness.testhost import requirement_lines

PYPROJECT = """
[project]
name = "Some-Pack"
version = "1.0.0"
[project.urls]
Repository = "https://github.com/someone/some-pack"
[tool.comfy]
PublisherId = "someone"
DisplayName = "Some pack"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with a tracked, a deleted, an untracked, a git-ignored and a pack-ignored file."""
    folder = tmp_path / "checkout"
    files = {"pyproject.toml": PYPROJECT, ".gitignore": "*.log\n", ".comfyignore": "/tests/\n/.*ignore\n"}
    files |= {name: name for name in ("tracked.py", "deleted.py", "tests/test.py")}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "deleted.py").unlink()
    (folder / "tracked.py").write_text("changed")
    (folder / "new file.py").write_text("untracked")
    (folder / "run.log").write_text("ignored")
    return folder


def test_the_zip_holds_what_git_would_track_but_for_comfyignore(checkout: Path) -> None:
    before = sorted(checkout.rglob("*"))
    with zipfile.ZipFile(io.BytesIO(pack.archive(checkout))) as archive:
        assert sorted(archive.namelist()) == ["new file.py", "pyproject.toml", "tracked.py"]
        assert archive.read("tracked.py") == b"changed"
    assert sorted(checkout.rglob("*")) == before


def test_installed_under_the_registry_id(checkout: Path, tmp_path: Path) -> None:
    folder = pack.install(tmp_path / "custom_nodes", checkout)
    assert folder == tmp_path / "custom_nodes" / "some-pack"
    assert (folder / "new file.py").read_text() == "untracked"


def test_a_faulty_pyproject_is_reported_with_what_comfy_cli_says(checkout: Path) -> None:
    (checkout / "pyproject.toml").write_text("[project\n")
    with pytest.raises(UserError, match="comfy node pack failed"):
        pack.archive(checkout)


def test_without_git_every_file_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").touch()
    assert pack.source_files(tmp_path) == ["a/b.py"]


@pytest.fixture(scope="module")
def own() -> list[str]:
    """Names in our own pack's zip."""
    with zipfile.ZipFile(io.BytesIO(pack.archive(pack.ROOT))) as archive:
        return archive.namelist()


def test_our_own_zip_holds_what_runs_and_nothing_else(own: list[str]) -> None:
    runs = {"__init__.py", "koala_loader.py"}
    runs |= {"koala", "host", "nodes", "web", "locales", "example_workflows", "subgraphs"}
    tells = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "requirements.txt", "assets"}
    assert {name.split("/")[0] for name in own} <= runs | tells
    assert {"__init__.py", "koala/architecture/layout.py", "host/reader.py", "host/accelerate/plan.py"} <= set(own)
    assert {"nodes/load.py", "nodes/speed.py", "assets/koala-tiny.safetensors", "LICENSE"} <= set(own)
    assert not [name for name in own if "bench" in name]


def test_the_two_lists_of_requirements_are_one() -> None:
    project = tomllib.loads((pack.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = requirement_lines((pack.ROOT / "requirements.txt").read_text("utf-8"))
    assert project["dependencies"] == lines
    assert not [line for line in lines if "==" in line or line.startswith("torch")]


def test_our_own_pack_is_valid_for_the_registry() -> None:
    assert "All validation checks passed" in pack.run_comfy_cli(["node", "validate"], pack.ROOT)


CI_FOLDER = pack.ROOT / ".github" / "workflows"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(CI_FOLDER.glob("*.yml"))}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_ci_workflow_may_read_and_uses_whole_versions_of_actions(name: str) -> None:
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"].values()
    assert not [job for job in jobs if "permissions" in job]
    used = [part["uses"] for job in jobs for part in (job, *job.get("steps", ())) if "uses" in part]
    assert used
    assert not [
        action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+|\./\.github/workflows/\w+\.yml", action)
    ]


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = [step["run"] for step in WORKFLOWS["test"]["jobs"]["test"]["steps"] if "run" in step]
    assert f"\n{command} " in (pack.ROOT / "README.md").read_text("utf-8")


def test_the_registrys_key_is_for_publishing_only() -> None:
    (step,) = WORKFLOWS["release"]["jobs"]["publish"]["steps"]
    assert step["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}
    assert [name for name, workflow in WORKFLOWS.items() if "secrets." in str(workflow)] == ["release"]


def test_ci_runs_every_test_at_night() -> None:
    by_day, at_night = WORKFLOWS["test"], WORKFLOWS["nightly"]
    assert at_night[True].keys() == {"schedule", "workflow_dispatch"}  # YAML's "on" is a truth value
    *prepared, last = at_night["jobs"]["test"]["steps"]
    assert prepared == by_day["jobs"]["test"]["steps"][:-1]
    assert last["run"] == f"{by_day['jobs']['test']['steps'][-1]['run']} --all"


def test_ci_keeps_what_the_environment_is_made_of() -> None:
    """The cache's key changes with every file that a cached environment or ComfyUI tree depends on."""
    steps = WORKFLOWS["test"]["jobs"]["test"]["steps"]
    (cache,) = [step["with"] for step in steps if step.get("uses", "").startswith("actions/cache@")]
    named = re.findall(r"'([^']+)'", cache["key"])
    assert all(any(fnmatch(file, pattern) for pattern in named) for file in testhost.FULL.requirements)
    assert {"tools/constraints.txt", "tools/harness/testhost.py"} <= set(named)
