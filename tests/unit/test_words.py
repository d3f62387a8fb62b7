"""Texts that remember their templates."""

from __future__ import annotations

import copy
import json

import pytest

from koala_sdxl.koala.words import Message, data, joined, lines, message

SAVED = message("saved as {path}", path="a/b")


def test_a_message_is_its_english_text() -> None:
    assert SAVED == "saved as a/b"
    assert f"{SAVED}." == "saved as a/b."
    assert json.dumps(SAVED) == '"saved as a/b"'
    assert str(ValueError(SAVED)) == "saved as a/b"
    assert ValueError(SAVED).args[0] is SAVED


def test_the_canvas_gets_template_and_values() -> None:
    assert data(SAVED) == {"template": "saved as {path}", "values": {"path": "a/b"}}
    assert data(7) == 7
    assert data("plain") == "plain"
    assert data(Message("plain")) == "plain"
    assert data({"words": {"saved": SAVED}, "sigmas": [1.0]}) == {"words": {"saved": data(SAVED)}, "sigmas": [1.0]}


def test_values_and_lines_may_be_messages() -> None:
    outer = lines(message("{count} files: {what}", count=2, what=SAVED), "koala.safetensors")
    assert outer == "2 files: saved as a/b\nkoala.safetensors"
    first = {"template": "{count} files: {what}", "values": {"count": 2, "what": data(SAVED)}}
    assert data(outer) == {"separator": "\n", "parts": [first, "koala.safetensors"]}
    assert json.loads(json.dumps(data(outer))) == data(outer)


def test_a_template_and_its_values_have_to_agree() -> None:
    with pytest.raises(KeyError):
        message("saved as {path}")


@pytest.mark.parametrize("copied", [copy.copy(SAVED), copy.deepcopy(SAVED)])
def test_a_copy_remembers_too(copied: Message) -> None:
    """ComfyUI copies what is attached to a MODEL."""
    assert copied == SAVED
    assert data(copied) == data(SAVED)


def test_nothing_joined_is_empty() -> None:
    assert not joined(", ", [])
