"""The pack as a user gets it: the registry's zip, made by `comfy node pack` and unpacked as Manager unpacks it.

The zip is made from a copy, so nothing lands in the checkout, and holds what git tracks or would track: a file that
was just written is in, one that git ignores is not. What .comfyignore names is left out by `comfy node pack` itself.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

from tools.harness import lifeline
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT


def install(custom_nodes: Path, checkout: Path = ROOT) -> Path:
    """Pack the checkout and unpack it into ``custom_nodes``; returns the pack's folder there. Raises UserError."""
    target = custom_nodes / project_name(checkout)
    target.mkdir(parents=True)
    with zipfile.ZipFile(io.BytesIO(archive(checkout))) as packed:
        packed.extractall(target)
    return target


@functools.cache  # once a process: squeezing the built-in model takes seconds, and tests start several servers
def archive(checkout: Path) -> bytes:
    """The registry's zip of ``checkout``. Raises UserError."""
    with lifeline.folder("koala-pack-") as temporary:
        copy = temporary / "copy"
        for name in source_files(checkout):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkout / name, copy / name)
        run_comfy_cli(["node", "pack"], copy)
        return (copy / "node.zip").read_bytes()


def run_comfy_cli(arguments: list[str], folder: Path) -> str:
    """Run comfy-cli in ``folder``, its settings and telemetry kept out of the person's home; returns what it printed.

    Raises UserError with its output if it fails.
    """
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *arguments]
    with lifeline.folder("comfy-cli-") as home:
        private = {**dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "RUFF_CACHE_DIR"), str(home)), "DO_NOT_TRACK": "1"}
        private["GIT_CEILING_DIRECTORIES"] = str(folder.parent)  # one around the scratch folder is none of ours
        environment = {**os.environ, **private}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode:
        raise UserError(f"comfy {' '.join(arguments)} failed with exit status {done.returncode}:\n{said}")
    return said


def source_files(checkout: Path) -> list[str]:
    """Paths relative to ``checkout`` of what git tracks or would track; of every file where there is no git."""
    command = ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        return sorted(str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file())
    return sorted({name for name in listed if name and (checkout / name).is_file()})


def project_name(checkout: Path) -> str:
    """The registry id, which is also the folder that Manager unpacks into."""
    return str(_project(checkout)["name"]).lower()


def version(checkout: Path) -> str:
    """The pack's version."""
    return str(_project(checkout)["version"])


def _project(checkout: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((checkout / "pyproject.toml").read_text("utf-8"))["project"]
    return project
