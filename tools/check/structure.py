"""`dev.py check`: the packages, which imports which, circles, the layers, and the length of files.

grimp reads the imports out of the source, those inside functions included; import-linter holds them against the
contracts in pyproject.toml. Both run in processes of their own, in a folder where every module has its one import name.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tools import PACK
from tools.harness.pack import source_files
from tools.harness.testhost import ROOT, say

IN_PACK = ("__init__.py", "koala", "host", "nodes", "koala_loader.py", "distill")
"""What the pack's import name leads to."""
ROOTS = (PACK, "batch", "tools")
LONGEST = 400  # lines of a Python file
CONFIG = str(ROOT / "pyproject.toml")
READ_IMPORTS = """
import grimp, json, sys
graph = grimp.build_graph(*sys.argv[1:], cache_dir=None)
print(json.dumps({module: sorted(graph.find_modules_directly_imported_by(module)) for module in sorted(graph.modules)}))
"""
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(sys.argv[1:])"

Imports = Mapping[str, Iterable[str]]
"""Module -> the modules that it imports directly; of the pack, the batch tool and the tools only."""


def main(_: list[str]) -> int:
    """The command line; returns the exit status."""
    imports = read_imports()
    say("packages -> packages that they import")
    for package, imported in sorted(packages(imports).items()):
        say(f"  {short(package):<20} -> {', '.join(sorted(map(short, imported))) or '-'}")
    return check(imports)


def run() -> int:
    """The same check without the table, for `dev.py test`."""
    return check(read_imports())


def check(imports: Imports) -> int:
    """Say what is wrong with imports and files; returns 1 if anything is."""
    found = circles(imports)
    say(f"circles: {len(found)}")
    for circle in found:
        say(f"  {' <-> '.join(circle)}")
    long = too_long(source_files(ROOT))
    say(f"Python files of more than {LONGEST} lines: {len(long)}")
    for name, lines in long.items():
        say(f"  {name}: {lines} lines; split it by what it does")
    contracts = layers()
    return int(bool(found or long or contracts))


def read_imports() -> dict[str, list[str]]:
    """The imports between the modules of ROOTS."""
    command = [sys.executable, "-c", READ_IMPORTS, *ROOTS]
    with importable() as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    imports: dict[str, list[str]] = json.loads(done.stdout)
    return imports


def layers() -> int:
    """import-linter with the contracts of pyproject.toml; its exit status. What it says is shown if one is broken."""
    with importable() as folder:
        command = [sys.executable, "-c", LINT_IMPORTS, "--no-cache", "--no-logo", CONFIG]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    kept = [line for line in done.stdout.splitlines() if line.startswith("Contracts: ")]
    say(kept[0] if kept and not done.returncode else done.stdout)
    return done.returncode


def packages(imports: Imports) -> dict[str, set[str]]:
    """Package -> the other packages that its own modules import; a package inside it counts by itself."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, imported in imports.items():
        package = package_of(module, imports)
        found[package] |= {package_of(other, imports) for other in imported} - {package}
    return dict(found)


def short(package: str) -> str:
    """A package's name without that of the pack."""
    return package.removeprefix(f"{PACK}.")


def package_of(module: str, modules: Iterable[str]) -> str:
    """The package that a module is in: itself if it has modules in it, or lies in no other package than a root."""
    parent = module.rpartition(".")[0]
    if parent in ("", *ROOTS) or any(other.startswith(f"{module}.") for other in modules):
        return module
    return parent


def circles(imports: Imports) -> list[tuple[str, ...]]:
    """Groups of neighbours that import each other, however indirectly.

    Neighbours are the modules and packages directly inside one package, and that package's own ``__init__``. The roots
    are no neighbours: the trainer's study uses the tools, which use the pack.
    """
    arrows: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module, imported in imports.items():
        for other in imported:
            package, ours, theirs = neighbours(module, other)
            if package and ours != theirs:
                arrows[package][ours].add(theirs)
    return [circle for package in sorted(arrows) for circle in groups(arrows[package])]


def neighbours(module: str, other: str) -> tuple[str, str, str]:
    """The innermost package that holds both modules, and its own members in which they are."""
    ours, theirs = module.split("."), other.split(".")
    shared = next((at for at, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one != two), None)
    shared = min(len(ours), len(theirs)) if shared is None else shared
    package = ".".join(ours[:shared])

    def member(parts: list[str]) -> str:
        return ".".join(parts[: shared + 1]) if len(parts) > shared else f"{package}.__init__"

    return package, member(ours), member(theirs)


def groups(arrows: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """The sets of nodes of a graph that lead to each other, each in the order of names."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(arrows.get(start, ()))
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += arrows.get(node, ())
        return seen

    reach = {node: reached(node) for node in arrows}
    both_ways = {tuple(sorted(other for other in reach[node] if node in reach.get(other, ()))) for node in arrows}
    return sorted(group for group in both_ways if group)


def too_long(names: Iterable[str]) -> dict[str, int]:
    """Python files with more than ``LONGEST`` lines, by their paths in the checkout, and how many lines each has."""
    lines = {name: len((ROOT / name).read_bytes().splitlines()) for name in names if name.endswith(".py")}
    return {name: count for name, count in lines.items() if count > LONGEST}


@contextlib.contextmanager
def importable() -> Iterator[Path]:
    """A temporary folder from which pack, tools and tests can be imported, each module by its one name.

    The pack's relative imports make sense only in a package, which the checkout is under any name: links give it one.
    """
    with tempfile.TemporaryDirectory(prefix="koala-importable-") as temporary:
        folder = Path(temporary)
        (folder / PACK).mkdir()
        for name in IN_PACK:
            os.symlink(ROOT / name, folder / PACK / name)
        for name in ("batch", "tools", "tests"):
            os.symlink(ROOT / name, folder / name, target_is_directory=True)
        yield folder
