"""Prompts that are longer than the text encoders take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cache import TOKENS
from ..texts import lengths

SHOWN = 10
"""How many lines of a file are named."""


def cut(path: Path, prompts: Mapping[int, str], tokenizer: Any) -> list[str]:
    """Which prompts of a file lose their end, in a line; none where none does.

    Args:
        path: the file.
        prompts: number of a line -> its prompt.
        tokenizer: CLIP's.
    """
    counted = zip(prompts, lengths(tokenizer, list(prompts.values())), strict=True)
    numbers = [line for line, length in counted if length > TOKENS]
    if not numbers:
        return []
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return [
        f"{path}: {len(numbers)} of {len(prompts)} prompts have more than {TOKENS} tokens, start and end included, and "
        f"are cut there: line {', '.join(map(str, numbers[:SHOWN]))}{more}"
    ]
