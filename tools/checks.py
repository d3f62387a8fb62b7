"""What `dev.py test` runs: ruff, mypy, the gates of tools/gates.py, then pytest."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools import gates
from tools.testhost import ROOT, say

PACK = "koala_pack"
SHIPPED = ("koala", "koala_reader", "koala_loader", "koala_saver", "transfer", "speed", "nodes")
PROCESSES = 2  # of pytest; more would be full-size models twice at a time
CONFIG = str(ROOT / "pyproject.toml")


def run(pytest_arguments: Sequence[str]) -> int:
    """Run the checks, then the tests; stops at the first that fails and returns its exit status.

    The last line of output is pytest's summary, if it comes to that.
    """
    for title, check in (
        ("ruff check", lint),
        ("ruff format", formatting),
        ("mypy", types),
        ("the packed pack", gates.run),
    ):
        say(f"== {title}")
        if status := check():
            say(f"== {title} failed; the tests were not run")
            return status
    say("== pytest")
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // PROCESSES)))
    # tests/conftest.py shares folders out; in the order of their names both processes end at about the same time
    sharing = [f"--numprocesses={PROCESSES}", "--dist=loadscope", "--no-loadscope-reorder"]
    return pytest.main([*sharing, *pytest_arguments])


def lint() -> int:
    return subprocess.call([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT)


def formatting() -> int:
    return subprocess.call([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT)


def types() -> int:
    """Type-check what ships, then the tools.

    The pack's relative imports make sense only in a package, which the checkout is under any name: a link gives it one.
    """
    cache = ["--config-file", CONFIG, "--cache-dir", str(ROOT / ".mypy_cache")]
    with tempfile.TemporaryDirectory(prefix="koala-mypy-") as temporary:
        os.symlink(ROOT, Path(temporary) / PACK, target_is_directory=True)
        modules = [option for name in SHIPPED for option in ("-p", f"{PACK}.{name}")]
        shipped = subprocess.call([sys.executable, "-m", "mypy", *cache, *modules], cwd=temporary)
    tools = subprocess.call([sys.executable, "-m", "mypy", *cache, "tools", "dev.py"], cwd=ROOT)
    return shipped or tools
