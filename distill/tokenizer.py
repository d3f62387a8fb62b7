"""CLIP's tokenizer as files: read in either form that transformers writes, handed on in the form that all of it reads.

transformers 4 and the published SDXL have vocab.json and merges.txt; transformers 5 writes one tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UserError

WORDS = 49408
"""Entries of CLIP's vocabulary."""
START, END = "<|startoftext|>", "<|endoftext|>"


def read_files(folder: Path) -> dict[str, bytes]:
    """A tokenizer's four files by name: the vocabulary, and settings for padding with the end token.

    Raises UserError where the folder holds no CLIP tokenizer.
    """
    try:
        vocabulary, merges = _read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no tokenizer that can be read ({error}); expected CLIP's vocab.json and merges.txt, or "
            f"tokenizer.json. Give the folder tokenizer/ of an SDXL, or comfy/sd1_tokenizer of a ComfyUI."
        ) from None
    if len(vocabulary) != WORDS:
        raise UserError(
            f"{folder} holds a tokenizer of {len(vocabulary)} entries; expected CLIP's {WORDS}. Give the folder "
            f"tokenizer/ of an SDXL, or comfy/sd1_tokenizer of a ComfyUI."
        )
    by_number = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return {
        "vocab.json": json.dumps(by_number, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(("#version: 0.2", *merges, "")).encode(),
        "special_tokens_map.json": _json(_special_tokens(plain=True)),
        "tokenizer_config.json": _json(
            {
                "add_prefix_space": False,
                "do_lower_case": True,
                "errors": "replace",
                "model_max_length": 77,
                "tokenizer_class": "CLIPTokenizer",
                **_special_tokens(plain=False),
            }
        ),
    }


def _read(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Word -> number, and the merges in order, each as two parts with a space between."""
    if (folder / "vocab.json").is_file():
        vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        return vocabulary, [line for line in lines if line and not line.startswith("#version")]
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _special_tokens(plain: bool) -> dict[str, Any]:
    kind = {} if plain else {"__type": "AddedToken"}

    def token(content: str) -> dict[str, Any]:
        return {
            **kind,
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }

    return {"bos_token": token(START), "eos_token": token(END), "pad_token": END, "unk_token": token(END)}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
