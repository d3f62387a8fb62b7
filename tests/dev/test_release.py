"""The release workflow: only a tag publishes, and only what was tested."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
import yaml

from tools.generate.canvas import PROJECT
from tools.harness.testhost import ROOT

WORKFLOWS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
RELEASE = WORKFLOWS["release.yml"]


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    """What starts a workflow; YAML 1.1 reads the key ``on`` as true."""
    found: dict[str, Any] = workflow[True]
    return found


def test_only_a_tag_publishes_and_only_after_the_tests() -> None:
    assert triggers(RELEASE) == {"push": {"tags": ["v*"]}}
    assert RELEASE["jobs"]["publish"]["needs"] == "test"
    assert RELEASE["jobs"]["test"]["needs"] == "version"
    assert RELEASE["jobs"]["test"]["uses"] == "./.github/workflows/test.yml"
    assert "workflow_call" in triggers(WORKFLOWS["test.yml"])
    steps = {name: str(workflow["jobs"]) for name, workflow in WORKFLOWS.items()}
    assert [name for name, jobs in steps.items() if "publish-node-action" in jobs] == ["release.yml"]


def test_the_tests_are_the_test_command() -> None:
    steps = WORKFLOWS["test.yml"]["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step][-1] == "python3 dev.py test"


@pytest.mark.parametrize(("tag", "status"), [(f"v{PROJECT['version']}", 0), ("v99.0.0", 1), (PROJECT["version"], 1)])
def test_a_tag_that_is_not_the_version_ends_the_release(tag: str, status: int) -> None:
    (script,) = [step["run"] for step in RELEASE["jobs"]["version"]["steps"] if "run" in step]
    environment = {**os.environ, "GITHUB_REF_NAME": tag}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert ("::error::The tag is" in done.stdout) == bool(status)
