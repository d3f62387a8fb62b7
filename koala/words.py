"""Texts that the canvas shows in its own language: English here, made of a template and its values.

ComfyUI runs a graph without knowing the language; the canvas knows it. So a text travels as data, too, and
web/lib/words.mjs looks its template up in locales/. `python3 dev.py generate` collects the templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Data = str | dict[str, Any]
"""What the canvas gets: a text as it is; or ``template`` and ``values``; or ``separator`` and ``parts``."""


class Message(str):
    """An English text that remembers what it was made of; joined or formatted by anything else it is plain English."""

    data: Data

    def __new__(cls, text: str, data: Data | None = None) -> Message:
        """``text`` in English, and what the canvas gets of it: the text as it is, where ``data`` is None."""
        made = super().__new__(cls, text)
        made.data = text if data is None else data
        return made


def message(template: str, /, **values: object) -> Message:
    """A text to be translated.

    Args:
        template: English, with a {name} for each value. Written out in the call, so that it is found; the few that are
            kept in tables are marked by ``template``.
        values: numbers, names, and texts that may be messages themselves; anything else is shown as ``str`` has it.
    """
    shown = {key: data(value) if isinstance(value, str | int) else str(value) for key, value in values.items()}
    return Message(template.format(**values), {"template": template, "values": shown})


def template(text: str) -> str:
    """Marks a template of a table, for a later ``message``, so that it is found."""
    return text


def joined(separator: str, parts: Iterable[str]) -> Message:
    """Texts in a row; each is translated by itself."""
    listed = list(parts)
    return Message(separator.join(listed), {"separator": separator, "parts": [data(part) for part in listed]})


def lines(*parts: str) -> Message:
    """A text of several lines."""
    return joined("\n", parts)


def data(value: Any) -> Any:
    """What the canvas gets of a value: a message's data, a mapping with the data of its values, or the value itself."""
    if isinstance(value, Mapping):
        return {key: data(inner) for key, inner in value.items()}
    return value.data if isinstance(value, Message) else value
