"""Whether the canvas could show a text in another language."""

from __future__ import annotations

import re
from collections.abc import Iterator

from koala_sdxl.koala.words import Data, Message


def english_only(text: str) -> list[str]:
    """Pieces of a text that no template gives, and that are more than a name or number: two words of prose."""
    return [piece for piece in _pieces(text.data if isinstance(text, Message) else text) if _WORDS.search(piece)]


_WORDS = re.compile(r"[a-z] [a-z]")


def _pieces(data: Data | int) -> Iterator[str]:
    if isinstance(data, dict):
        for inner in data.get("parts") or data["values"].values():
            yield from _pieces(inner)
    else:
        yield str(data)
