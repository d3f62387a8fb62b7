"""The prompts of contact sheets, and captions that fit below an image. Needs no PyTorch, as `dev.py demo` does not."""

from __future__ import annotations

from typing import Any

PROMPTS = (
    "a gray koala on a green background",
    "a red circle on a white background",
    "a blue star on a yellow background",
    "a purple triangle on a gray background",
    "an orange ring on a blue background",
    "a white square on a red background",
    "a black koala on an orange background",
    "a green star on a purple background",
    "a yellow circle on a black background",
    "a white koala on a blue background",
    "a red triangle on a gray background",
    "a purple ring on a white background",
)


def wrapped(text: str, font: Any, width: int) -> str:
    """The text broken into lines that fit ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
