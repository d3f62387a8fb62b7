"""What `dev.py test` runs: ruff, mypy, the gates of tools/check/gates.py, then pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tools import PACK, commands
from tools.check import gates, structure
from tools.check.coverage import Coverage
from tools.check.usage import Usage
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT, say

PROCESSES = 2  # of pytest
SLOWEST = 25  # tests that are listed at the end
CONFIG = str(ROOT / "pyproject.toml")


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    options, further = commands.parser("test").parse_known_args(argv)
    return run(further, options.all)


def run(pytest_arguments: Sequence[str], everything: bool = False) -> int:
    """Run the checks, then the tests; stops at the first that fails and returns its exit status.

    Without ``everything`` the tests marked nightly are left out. The last line of output is pytest's summary, if it
    comes to that. Raises UserError for files of tests that are not there, which pytest would say minutes later.
    """
    require_paths(pytest_arguments)
    usage = Usage()
    for title, check in (
        ("ruff check", lint),
        ("ruff format", formatting),
        ("mypy", types),
        ("imports and files", structure.run),
        ("generated files", generated),
        ("the packed pack", gates.run),
    ):
        say(f"== {title}")
        if status := check():
            say(f"== {title} failed; the tests were not run")
            return status
    say("== pytest")
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // PROCESSES)))
    return pytest.main([*arguments(everything), *pytest_arguments], plugins=[usage, Coverage(not pytest_arguments)])


def require_paths(words: Sequence[str]) -> None:
    """Raise UserError if a word that can only be a file of tests, or a folder of them, is none."""
    for before, word in zip(("", *words), words, strict=False):
        path = word.split("::")[0]
        if word.startswith("-") or before.startswith("-") or not ("/" in path or path.endswith(".py")):
            continue  # an option, or what may be an option's value
        if not (ROOT / path).exists():
            raise UserError(f"{word}: no such test; expected a file or folder below tests/, such as tests/unit.")


def arguments(everything: bool) -> list[str]:
    """pytest's, before those that one gives oneself."""
    # tests/conftest.py says what stays together, and in which order it is handed out
    sharing = [f"--numprocesses={PROCESSES}", "--dist=loadscope", "--no-loadscope-reorder"]
    return [*sharing, f"--durations={SLOWEST}", *([] if everything else ["-m", "not nightly"])]


def lint() -> int:
    return subprocess.call([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT)


def formatting() -> int:
    return subprocess.call([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT)


def generated() -> int:
    from tools.generate.__main__ import check_without_server

    return check_without_server()


def types() -> int:
    """Type-check everything under the one name that each module has.

    The pack's relative imports make sense only in a package, which the checkout is under any name: links give it one.
    """
    with structure.importable() as folder:
        packages = [option for name in (PACK, "batch", "tools", "tests") for option in ("-p", name)]
        options = ["--config-file", CONFIG, "--cache-dir", str(ROOT / ".mypy_cache")]
        return subprocess.call([sys.executable, "-m", "mypy", *options, *packages], cwd=folder)
