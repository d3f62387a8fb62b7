"""Workflows as every version of the pack saved them: each still becomes the graph that it was, and is accepted.

workflows/<version>/ holds frozen pairs (tools/generate/frozen.py writes them, once a version). A change that moves a
widget or renames an input fails here; that is to be undone, never these files changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.generate.canvas import PROJECT
from tools.generate.frozen import API, BUILT, FOLDER
from tools.harness.client import Client, GraphError, Prompt
from tools.harness.workflow import to_prompt

SAVED = sorted(path for path in FOLDER.glob("*/*.json") if not path.stem.endswith(API))
TITLES = [f"{path.parent.name}, {path.stem}" for path in SAVED]


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def queued(path: Path) -> Prompt:
    """The graph that a saved workflow was queued as, when it was saved."""
    prompt: Prompt = read(path.with_name(f"{path.stem}{API}.json"))
    return prompt


def lost(before: Prompt, now: Prompt) -> dict[str, Any]:
    """What a graph had in each node and has not now: an input may come to be, but none may change or go."""
    changed: dict[str, Any] = {
        f"{number} {node['class_type']} {name}": (value, now[number]["inputs"].get(name))
        for number, node in before.items()
        if number in now
        for name, value in node["inputs"].items()
        if now[number]["inputs"].get(name) != value
    }
    return changed | dict.fromkeys(before.keys() ^ now.keys(), "another node")


def absent(value: Any) -> Any:
    """A model file's name made one that no server has, whatever other tests have put there: nothing large is run."""
    return f"absent {value}" if str(value).endswith(".safetensors") else value


def faults(client: Client, prompt: Prompt) -> list[str]:
    """What the server finds wrong with a graph, but for its files. A graph that names none is run."""
    nodes = {
        number: node | {"inputs": {name: absent(value) for name, value in node["inputs"].items()}}
        for number, node in prompt.items()
    }
    try:
        client.run(nodes)
    except GraphError as error:
        found = [(node["class_type"], fault) for node in error.errors.values() for fault in node["errors"]]
        return [f"{kind}: {fault}" for kind, fault in found if not is_absent_file(fault)]
    return []


def is_absent_file(fault: dict[str, Any]) -> bool:
    """A model, or the picture that ComfyUI comes with: the server checks that one itself."""
    extra = fault["extra_info"]
    model = fault["type"] == "value_not_in_list" and str(extra["received_value"]).startswith("absent ")
    return model or (fault["type"] == "custom_validation_failed" and extra["input_name"] == "image")


@pytest.mark.parametrize("path", SAVED, ids=TITLES)
def test_a_saved_workflow_is_queued_as_it_was(path: Path, object_info: dict[str, Any]) -> None:
    assert lost(queued(path), to_prompt(read(path), object_info)) == {}


@pytest.mark.parametrize(
    "path",
    # training takes two minutes; by day the template it was saved from is run (test_example_workflows.py)
    [pytest.param(path, marks=[pytest.mark.nightly] if "training" in path.stem else []) for path in SAVED],
    ids=TITLES,
)
def test_an_exported_graph_is_accepted(path: Path, client: Client) -> None:
    assert faults(client, queued(path)) == []


def test_this_version_is_frozen_with_every_node(object_info: dict[str, Any]) -> None:
    """If this fails for a new version, or a node that came before its release: `python3 dev.py generate frozen`."""
    folder = FOLDER / PROJECT["version"]
    saved = {node["type"] for title in BUILT for node in read(folder / f"{title}.json")["nodes"]}
    assert {name for name in object_info if name.startswith("Koala")} <= saved
