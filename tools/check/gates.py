"""What the registry and the checkers of other people ask of the pack: on the packed zip, without a network.

A gate takes the folder that the zip was unpacked into and returns its complaints, each one complete in itself. What a
gate says of something that is right is excepted below, once, with the reason. A gate that wants to look at more than
the zip (ComfyUI's source, the schemas of a running server) gets it here.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_lint.linter import lint_workflow
from comfy_lint.schema import normalize
from nodesafe.scanner import Scanner

from tools.harness import pack, testhost
from tools.harness.client import Client, Prompt
from tools.harness.errors import UserError
from tools.harness.server import running
from tools.harness.testhost import RELEASES, ROOT, say
from tools.harness.workflow import ObjectInfo, Workflow, to_prompt

Gate = Callable[[Path], list[str]]
REGISTRY_RULES = "S102,S307,E702"  # exec, eval, and two statements on a line: what the registry will refuse
MODULE_NAMES = ("__file__", "__name__", "__doc__", "__path__")  # every module has them, in no source file


def run() -> int:
    """Pack the checkout, unpack it, and put it through every gate; returns 1 if any of them complains."""
    failed = False
    with tempfile.TemporaryDirectory(prefix="koala-gates-") as temporary:
        folder = pack.install(Path(temporary) / "custom_nodes")
        for title, gate in GATES.items():
            say(f"== {title}")
            for complaint in gate(folder):
                failed = True
                say(complaint)
    return int(failed)


def valid(folder: Path) -> list[str]:
    """`comfy node validate`: the registry's own look at pyproject.toml. Ruff's part of it is a gate of its own."""
    try:
        said = pack.run_comfy_cli(["node", "validate"], folder)
    except UserError as problem:
        return [str(problem)]
    return [] if "All validation checks passed" in said else [said.strip()]


def registry_rules(folder: Path) -> list[str]:
    """Ruff with the registry's rules and no exceptions; `comfy node validate` ends well with findings of it."""
    options = ["--isolated", "--no-cache", "--ignore-noqa", "--output-format", "concise", "--quiet"]
    return _python("ruff", "check", *options, "--select", REGISTRY_RULES, str(folder)).stdout.splitlines()


def comfy_test(folder: Path) -> list[str]:
    """`comfy-test lint`: text that Windows cannot print, code bound to one kind of GPU, scripts that meddle."""
    done = _python("comfy_test", "lint", str(folder), "--strict")
    return [done.stdout + done.stderr] if done.returncode else []


def host_symbols(folder: Path) -> list[str]:
    """`comfy-import-guard`: whatever the pack takes from ComfyUI is there, and takes these arguments, in every release.

    It reads ComfyUI's source out of a git repository; one is made here, with a tag for each release.
    """
    with tempfile.TemporaryDirectory(prefix="koala-guard-") as temporary:
        repository = Path(temporary) / "ComfyUI"
        repository.mkdir()
        _git(repository, "init", "--quiet")
        complaints = []
        for release in RELEASES:
            source = testhost.pinned_host(release).folder
            _git(repository, "--work-tree", str(source), "add", "--all", "--force", "--", "*.py")
            _git(repository, "commit", "--quiet", "--message", release)
            _git(repository, "tag", f"v{release}")
            options = ["--cache-dir", temporary, "--offline", "--quiet", "--json", "--strict"]
            what = ["--comfy-dir", str(folder.parent), "--pack", folder.name, "--target", f"v{release}"]
            done = _python("comfy_import_guard.cli", "check", *options, *what)
            if done.returncode not in (0, 1):
                raise UserError(f"comfy-import-guard failed with exit status {done.returncode}:\n{done.stderr}")
            for found in json.loads(done.stdout)["packs"]:
                complaints += [f"ComfyUI {release}: {line}" for line in _broken(found)]
    return complaints


def _broken(found: Mapping[str, Any]) -> Iterable[str]:
    """What comfy-import-guard found in a pack, each as a line."""
    # "soft" are those that a try or a second call of another shape may excuse; the pack has no such code
    for row in (*found["breaking"], *found["soft"], *found["signature_drift"], *found["unresolvable"]):
        if row.get("symbol") not in MODULE_NAMES:
            yield f"{row['file']}:{row['line']}: {row['dotted']}: {row['status']} {row['detail']}"
    yield from (f"{file}: cannot be parsed" for file in found["unparseable"])


@dataclass(frozen=True)
class Excepted:
    """A finding that is none: nodesafe's category for it, what stands on that line, and why that is right."""

    category: str
    line: str  # a regular expression
    reason: str


EXCEPTED = (
    Excepted("code_execution", r"(?<!\w)re\.compile\(", "makes a regular expression, not code"),
    Excepted(
        "code_obfuscation_high_entropy",
        r"re\.compile\(r\"|\br\"\(",
        "a regular expression uses more kinds of letters than prose; encoded text is looked for below",
    ),
    Excepted(
        "dynamic_attribute_access",
        r"getattr\(\w+, numbering\)",
        "numbering is a literal type: the name of a column of our own table of tensor names",
    ),
    Excepted(
        "dynamic_attribute_access",
        r"getattr\(self\.patch, name\)",
        "stands for another node's patch: whatever is asked of it, the patch answers",
    ),
    Excepted(
        "dynamic_attribute_access",
        r"getattr\(value, name\) for name in slots",
        "reads what an object of another node keeps in slots; nothing is called",
    ),
    Excepted(
        "dynamic_attribute_access",
        r"getattr\(type\(self\.control\), method\)",
        "method is one of four methods of a ControlNet, written out above",
    ),
    Excepted(
        "code_execution",
        r"torch\.compile\(own, fullgraph=True\)",
        "PyTorch's compiler, on functions of this pack's own; no text is compiled",
    ),
)
LONGEST_WORD = 60
"""Characters between two spaces of a prose text, at most. nodesafe counts how evenly characters are used, by which
English is as dense as a hidden payload; but a payload has no spaces."""


def nodesafe(folder: Path) -> list[str]:
    """nodesafe, all layers: patterns of malicious code. Any finding is a complaint, however slight."""
    complaints = []
    for found in Scanner().scan(folder).findings:
        file = folder / found.file
        line = file.read_text("utf-8").splitlines()[found.line - 1] if found.line and file.suffix in CODE else ""
        known = any(found.category == one.category and re.search(one.line, line) for one in EXCEPTED)
        if not known and not (found.category == "code_obfuscation_high_entropy" and _is_prose(file, found.line)):
            place = f"{found.file}:{found.line}"
            complaints.append(f"{place}: {found.category} ({found.severity.value}): {line.strip() or found.snippet}")
    return complaints


def _is_prose(file: Path, line: int) -> bool:
    """True if no text that begins on this line of a Python file holds anything too long for a word."""
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and node.lineno == line]
    return all(len(word) <= LONGEST_WORD for text in texts if isinstance(text, str) for word in text.split())


FLAGGED = {
    "network": r"\b(urllib|aiohttp|httpx|http\.client|ftplib|websockets?|paramiko)\b"
    r"|\b(requests|socket)\.\w|import (requests|socket)\b|XMLHttpRequest|WebSocket|(?<![\w.])fetch\(",
    "environment": r"\bos\.(environ|getenv|putenv|unsetenv)\b|import environ\b|process\.env",
    "commands": r"\bsubprocess\b|\bos\.(system|popen|exec\w*|spawn\w*|fork)\b|\bshell\s*=|\bpty\b|child_process",
    "code from text": r"(?<![\w.])(eval|exec|compile|__import__)\s*\(|import_module|new Function|\bFunction\(",
    "unsafe reading": r"\bimport (pickle|marshal|dill|shelve)|\b(pickle|marshal|dill|shelve)\.\w|torch\.load\b",
    "routes": r"\broutes\.(get|post|put|delete)\b|add_routes|@routes\b|add_static",
    "packages": r"\bpip\b|ensurepip|pkg_resources",
    "encoded text": r"\b(base64|codecs|binascii|zlib)\b|[A-Za-z0-9+/]{90,}",
}
"""What the registry's scan flags a version for, in code and in comments: kind -> regular expression."""
CODE = {".py", ".js", ".mjs", ".css"}
SUFFIXES = CODE | {".md", ".json", ".toml", ".txt", ".safetensors", ".jpg", ".png", ".svg", ".webp"}
NAMES = {"LICENSE"}


def flagged(folder: Path) -> list[str]:
    """Words that the registry's scan flags, and files of a kind that has no place in the zip."""
    complaints = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.is_symlink() or hidden or not (path.suffix in SUFFIXES or path.name in NAMES):
            complaints.append(f"{name}: no kind of file that the pack ships; leave it out by .comfyignore")
        elif path.suffix in CODE:
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                kinds = [kind for kind, pattern in FLAGGED.items() if re.search(pattern, line)]
                complaints += [f"{name}:{number}: {kind}: {line.strip()}" for kind in kinds]
    return complaints


def workflows(folder: Path) -> list[str]:
    """`comfy-lint` on the API form of every example workflow, against the schemas of a bare server with the pack."""
    host = testhost.test_host()
    paths = sorted((folder / "example_workflows").glob("*.json"))
    with running(host, arguments=["--input-directory", str(host.folder / "input")]) as server:
        info = Client(server.url).object_info()
    return [complaint for path in paths for complaint in workflow_faults(path, info)]


def workflow_faults(path: Path, info: ObjectInfo) -> list[str]:
    """What comfy-lint finds in a workflow, warnings too. Files that it offers for download count as being there."""
    workflow: Workflow = json.loads(path.read_text("utf-8"))
    try:
        prompt = to_prompt(workflow, info)
    except UserError as problem:
        return [f"{path.name}: {problem}"]
    schema = normalize(flat(with_downloads(info, workflow, prompt)))
    return [
        f"{path.name}: node {found.node_id} ({found.class_type}), {found.field}: {found.rule}: {found.message}"
        for found in lint_workflow(prompt, schema)
    ]


def with_downloads(info: ObjectInfo, workflow: Workflow, prompt: Prompt) -> ObjectInfo:
    """The schemas as they are once each node's downloads are in their folders.

    Only the node that offers a file gets it as a choice, for the input that names it: any other name is still wrong.
    """
    changed: ObjectInfo = json.loads(json.dumps(info))
    for node in workflow["nodes"]:
        offered = {model["name"] for model in node["properties"].get("models", [])}
        values = prompt.get(str(node["id"]), {"inputs": {}})["inputs"]
        for name in (name for name, value in values.items() if isinstance(value, str) and value in offered):
            for options in _choices(changed[node["type"]]["input"], name):
                options.append(values[name])
    return changed


def _choices(inputs: Mapping[str, Any], name: str) -> Iterable[list[Any]]:
    """The lists of choices of an input, by its name in a prompt (``source.folder`` for one of a dynamic combo)."""
    first, _, rest = name.partition(".")
    for section in ("required", "optional"):
        kind, *options = inputs.get(section, {}).get(first, [None])
        if isinstance(kind, list):
            yield kind
        elif options and not rest:
            yield options[0].get("options", [])
        elif options:
            for option in options[0].get("options", []):
                yield from _choices(option["inputs"], rest)


def flat(info: ObjectInfo) -> ObjectInfo:
    """The schemas with each dynamic combo, which comfy-lint does not know, as a combo and optional further inputs.

    So it is not judged whether the chosen option's own inputs are all there; the server judges that when it is run.
    """
    changed: ObjectInfo = json.loads(json.dumps(info))
    for node in changed.values():
        for section in ("required", "optional"):
            for name, (kind, *options) in list(node["input"].get(section, {}).items()):
                if kind == "COMFY_DYNAMICCOMBO_V3":
                    choices = options[0]["options"]
                    node["input"][section][name] = ["COMBO", {"options": [choice["key"] for choice in choices]}]
                    further = node["input"].setdefault("optional", {})
                    for inner, spec in ((f"{name}.{key}", spec) for one in choices for key, spec in _inner(one)):
                        further[inner] = spec
    return changed


def _inner(choice: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for section in ("required", "optional"):
        yield from choice["inputs"].get(section, {}).items()


GATES: dict[str, Gate] = {
    "comfy node validate": valid,
    "ruff, the registry's rules": registry_rules,
    "comfy-test lint": comfy_test,
    "comfy-import-guard": host_symbols,
    "nodesafe": nodesafe,
    "what the registry's scan flags": flagged,
    "comfy-lint": workflows,
}


def _python(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a checker; its settings and caches go to a folder that is then deleted."""
    with tempfile.TemporaryDirectory(prefix="koala-gate-home-") as home:
        environment = {**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _git(repository: Path, *arguments: str) -> None:
    """Run git on a repository of ours, whatever the person's own settings are. Raises UserError."""
    author = {f"GIT_{who}_{what}": "koala@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment = {**own, **author, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    command = ["git", "--git-dir", str(repository / ".git"), *arguments]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)} failed with exit status {done.returncode}:\n{done.stderr}")
