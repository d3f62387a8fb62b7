"""Every gate of tools/check/gates.py: silent on the pack as it is, and not on a copy with one thing wrong in it."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.check import gates
from tools.check.gates import GATES, workflow_faults
from tools.harness import pack
from tools.harness.testhost import RELEASES, TESTED_RELEASE

TEXT_TO_IMAGE = "01 KOALA-tiny text to image.json"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip, unpacked once; its model left out, which no gate looks into."""
    folder = pack.install(tmp_path_factory.mktemp("gates") / "custom_nodes")
    (folder / "assets" / "koala-tiny.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def said(packed: Path) -> Callable[[str], list[str]]:
    """What a gate says of the pack as it is, asked once."""
    return functools.cache(lambda title: GATES[title](packed))


@pytest.fixture(scope="module")
def said_of_faults(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """What a gate says of a copy with all of that gate's faults in it, asked once; one that hides others, alone."""

    @functools.cache
    def ask(title: str, alone: str = "") -> list[str]:
        folder = tmp_path_factory.mktemp("spoilt") / "custom_nodes" / packed.name
        shutil.copytree(packed, folder)
        for gate, file, text, words in FAULTS:
            if gate == title and (words == alone if alone else words not in HIDING):
                append(folder / file, text)
        return GATES[title](folder)

    return ask


def append(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(text)


NEW_MODULE = "comfy.internal_logging"
"""One that only the newest of the tested releases has."""
FAULTS = [
    ("comfy node validate", "pyproject.toml", "\n[broken", "comfy node validate failed"),
    ("ruff, the registry's rules", "nodes/base.py", "\neval('1')  # noqa: S307\n", "S307"),
    ("ruff, the registry's rules", "nodes/base.py", "\nexec('1')\n", "S102"),
    ("ruff, the registry's rules", "nodes/base.py", "\nx = 1; y = 2\n", "E702"),
    ("comfy-test lint", "koala_loader.py", "\nmodel.cuda()\n", ".cuda()"),
    ("comfy-test lint", "koala_loader.py", "\n# \N{BUG}\n", "not encodable in cp1252"),
    ("comfy-test lint", "web/other.js", "document.addEventListener('keydown', go);\n", "other.js:1"),
    ("comfy-import-guard", "koala_loader.py", "\ncomfy.sd.load_koala()\n", "comfy.sd.load_koala: MISSING"),
    ("comfy-import-guard", "koala_loader.py", "\ncomfy.utils.load_torch_file()\n", "comfy.utils.load_torch_file: "),
    ("comfy-import-guard", "koala/new.py", "import comfy.koala\n", "comfy.koala: MODULE_MISSING"),
    ("comfy-import-guard", "koala_loader.py", f"\nimport {NEW_MODULE}\n", NEW_MODULE),
    ("nodesafe", "koala_loader.py", "\nimport ctypes\n", "native_invocation (medium): import ctypes"),
    ("nodesafe", "koala_loader.py", "\ngetattr(comfy, input())\n", "dynamic_attribute_access"),
    ("nodesafe", "koala_loader.py", f"\nPAYLOAD = '{'aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xYzC' * 2}'\n", "high_entropy"),
    ("what the registry's scan flags", "koala_loader.py", "\nimport requests\n", "network: import requests"),
    ("what the registry's scan flags", "nodes/load.py", "\n# as urllib does\n", "network: # as urllib does"),
    ("what the registry's scan flags", "koala_loader.py", "\nos.environ['A'] = '1'\n", "environment: os.environ"),
    ("what the registry's scan flags", "koala_loader.py", "\nos.system('ls')\n", "commands: os.system"),
    ("what the registry's scan flags", "koala_loader.py", "\neval('1')\n", "code from text: eval"),
    ("what the registry's scan flags", "koala_loader.py", "\nimport pickle\n", "unsafe reading: import pickle"),
    ("what the registry's scan flags", "nodes/load.py", "\n@routes.get('/koala')\n", "routes: @routes.get"),
    ("what the registry's scan flags", "nodes/load.py", "\nrun(['pip', 'install'])\n", "packages: run"),
    ("what the registry's scan flags", "nodes/load.py", f"\nX = '{'QUJD' * 30}'\n", "encoded text: X ="),
    ("what the registry's scan flags", "web/koala.js", "\nfetch('/koala')\n", "network: fetch"),
    ("what the registry's scan flags", "web/koala.js", "\nnew Function('1')\n", "code from text: new Function"),
    ("what the registry's scan flags", "install.sh", "ls\n", "install.sh: no kind of file"),
    ("what the registry's scan flags", ".github/workflows.json", "{}", ".github/workflows.json: no kind of file"),
]
HIDING = {"not encodable in cp1252"}
"""Of these a gate says nothing else."""


@pytest.mark.parametrize(("title", "words"), [(title, words) for title, _, _, words in FAULTS], ids=lambda part: part)
def test_a_fault_is_seen(
    title: str, words: str, said: Callable[[str], list[str]], said_of_faults: Callable[..., list[str]]
) -> None:
    assert not [complaint for complaint in said(title) if words in complaint]
    asked = said_of_faults(title, words) if words in HIDING else said_of_faults(title)
    assert [complaint for complaint in asked if words in complaint]


def test_every_gate_is_shown_to_see_something() -> None:
    assert {title for title, *_ in FAULTS} | {"comfy-lint"} == set(GATES)


def test_what_only_the_newest_release_has_is_missing_in_the_older_ones(
    said_of_faults: Callable[..., list[str]],
) -> None:
    seen = [complaint.split(":")[0] for complaint in said_of_faults("comfy-import-guard") if NEW_MODULE in complaint]
    assert seen == [f"ComfyUI {release}" for release in RELEASES if release != TESTED_RELEASE]


def test_what_is_excepted_is_still_there(packed: Path) -> None:
    code = "\n".join(path.read_text("utf-8") for path in packed.rglob("*.py"))
    for known in gates.EXCEPTED:
        assert re.search(known.line, code), known


def _no_such_node(info: dict[str, Any]) -> None:
    info.pop("KoalaSampler")


def _no_such_choice(info: dict[str, Any]) -> None:
    info["KoalaPrompt"]["input"]["required"]["mode"][1]["options"] = ["other"]


def _no_such_option(info: dict[str, Any]) -> None:
    for option in info["KoalaSampler"]["input"]["required"]["preset"][1]["options"]:
        option["key"] = "other"


def _one_more_required(info: dict[str, Any]) -> None:
    info["VAEDecode"]["input"]["required"]["tile"] = ["TILE", {}]


def _another_type(info: dict[str, Any]) -> None:
    info["KoalaCheckpointLoader"]["output"] = ["MODEL", "CLIP", "LATENT"]


def _one_less_output(info: dict[str, Any]) -> None:
    info["KoalaCheckpointLoader"]["output"] = ["MODEL", "CLIP"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_such_node, "no node of class KoalaSampler"),
        (_no_such_choice, "mode: invalid-enum"),
        (_no_such_option, "'preset' selector 'auto' matched no option"),
        (_one_more_required, "missing-required"),
        (_another_type, "type-mismatch"),
        (_one_less_output, "dangling-link"),
    ],
)
def test_a_workflow_that_does_not_fit_the_nodes(
    spoil: Callable[[dict[str, Any]], None], words: str, packed: Path, object_info: dict[str, Any]
) -> None:
    info = json.loads(json.dumps(object_info))
    path = packed / "example_workflows" / TEXT_TO_IMAGE
    assert workflow_faults(path, info) == []
    spoil(info)
    assert any(words in fault for fault in workflow_faults(path, info))


def test_a_file_that_the_workflow_does_not_offer_is_no_choice(
    packed: Path, tmp_path: Path, object_info: dict[str, Any]
) -> None:
    path = packed / "example_workflows" / "05 KOALA-700M with an SDXL LoRA.json"
    assert workflow_faults(path, object_info) == []
    workflow = json.loads(path.read_text("utf-8"))
    loader = next(node for node in workflow["nodes"] if node["type"] == "KoalaLoraLoader")
    loader["properties"]["models"] = []
    changed = tmp_path / path.name
    changed.write_text(json.dumps(workflow), "utf-8")
    (fault,) = workflow_faults(changed, object_info)
    assert "lora_name: invalid-enum" in fault
