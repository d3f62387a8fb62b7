"""Templates of texts, found in the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.generate.messages import in_javascript, in_python, templates
from tools.harness.errors import UserError


def written(folder: Path, name: str, source: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, "utf-8")
    return path


def test_templates_of_python(tmp_path: Path) -> None:
    source = """
TABLE = (Known(template("it works on {model}")),)
def execute(known):
    return lines(message("saved as {path}", path=1), message("one " "text"), message(known.reason, model=2))
"""
    assert list(in_python(written(tmp_path, "a.py", source))) == ["it works on {model}", "saved as {path}", "one text"]


@pytest.mark.parametrize("call", ['message(f"saved as {path}")', "message(text)", "message()", "template(known.text)"])
def test_a_template_that_is_not_written_out_is_named(tmp_path: Path, call: str) -> None:
    with pytest.raises(UserError, match=r"a\.py, line 2: the template of a message is not written out"):
        list(in_python(written(tmp_path, "a.py", f"\n{call}")))


def test_templates_of_javascript(tmp_path: Path) -> None:
    source = """
const one = message("{count} set", { count });
notify("warn", message('not "{name}"', { name }));
const two = message(
  "a long one " +
    "in two parts",
);
"""
    found = list(in_javascript(written(tmp_path, "a.mjs", source)))
    assert found == ["{count} set", 'not "{name}"', "a long one in two parts"]


@pytest.mark.parametrize("call", ["message(`${count} set`)", "message(text)", 'message("one " + two)'])
def test_a_template_of_javascript_that_is_not_written_out_is_named(tmp_path: Path, call: str) -> None:
    with pytest.raises(UserError, match=r"a\.mjs, line 2: the template"):
        list(in_javascript(written(tmp_path, "a.mjs", f"\n{call}")))


def test_all_sources_are_searched_and_the_result_is_sorted(tmp_path: Path) -> None:
    written(tmp_path, "nodes/b.py", 'message("b")')
    written(tmp_path, "host/transfer/a.py", 'message("a")')
    written(tmp_path, "koala/lora/d.py", 'message("d")\nmessage("a")')
    written(tmp_path, "web/lib/c.mjs", 'message("c")')
    written(tmp_path, "tests/e.py", 'message("e")')
    assert templates(tmp_path) == ["a", "b", "c", "d"]
