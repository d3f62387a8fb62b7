"""The templates of texts that the canvas shows in its own language, out of the calls of ``message`` in the sources.

See koala/words.py and web/lib/words.mjs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

PYTHON = ("koala", "host", "nodes")
JAVASCRIPT = ("web",)
WORDS = ("koala/words.py", "web/lib/words.mjs")
"""Where ``message`` itself is defined."""

_CALL = re.compile(r"\bmessage\(\s*")
_STRING = re.compile(r"""("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')\s*(\+?)\s*""")


def templates(root: Path = ROOT) -> list[str]:
    """Every template, sorted. Raises UserError, naming file and line, where one is not written out in the call."""
    python = (path for folder in PYTHON for path in _files(root / folder, ("py",)))
    javascript = (path for folder in JAVASCRIPT for path in _files(root / folder, ("js", "mjs")))
    ours = {root / words for words in WORDS}
    found = {text for path in python if path not in ours for text in in_python(path)}
    return sorted(found | {text for path in javascript if path not in ours for text in in_javascript(path)})


def _files(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    return (path for suffix in suffixes for path in folder.rglob(f"*.{suffix}"))


def in_python(path: Path) -> Iterator[str]:
    """The templates in a Python file: first arguments of ``message``, and those that ``template`` marks for it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id not in ("message", "template"):
            continue
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value
        elif node.func.id == "template" or not isinstance(first, ast.Attribute):  # an attribute: of a table
            raise _not_written_out(path, node.lineno)


def in_javascript(path: Path) -> Iterator[str]:
    """The templates in a JavaScript file, which may be added up of several strings."""
    source = path.read_text("utf-8")
    for call in _CALL.finditer(source):
        text, end = "", call.end()
        while string := _STRING.match(source, end):
            text, end = text + ast.literal_eval(string[1]), string.end()
            if not string[2]:
                break
        if not string:
            raise _not_written_out(path, source.count("\n", 0, call.start()) + 1)
        yield text


def _not_written_out(path: Path, line: int) -> UserError:
    return UserError(
        f"{path}, line {line}: the template of a message is not written out; expected a string as the first argument, "
        f"with a {{name}} for each value, so that it can be translated. Give what varies as values."
    )
