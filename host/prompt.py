"""Prompts as diffusers' SDXL pipeline reads them: the tokens that its two tokenizers give, for any text.

ComfyUI's own tokenizer does more (weights, embeddings, escaped brackets, prompts of any length), so the tokens come
from the transformers tokenizers inside it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..koala.architecture.components import PROMPT_TOKENS
from .protocols import Clip, Conditioning

ENCODERS = {"l": "clip_l", "g": "clip_g"}
"""ComfyUI's short name of each text encoder -> the attribute of SDXL's tokenizer that reads for it."""
PADDING = "!"
"""What fills up CLIP-G's prompts in SDXL's ``tokenizer_2``. transformers splits a text at its padding word, so that an
exclamation mark is token 0 there, and not 256 as in ComfyUI."""
END = "<|endoftext|>"


class Tokens(NamedTuple):
    """A text for one encoder: the ids it gets, start, end and padding included, and the text that did not fit."""

    ids: list[int]
    lost: str


class Encoded(NamedTuple):
    """A prompt's conditioning, and what was lost of it, by the encoder's short name."""

    conditioning: Conditioning
    lost: dict[str, str]


def encode_reference(clip: Clip, text: str) -> Encoded:
    """Encode as diffusers' SDXL pipeline: one section of 77 tokens, without weights; all other text is literal.

    Size conditioning is left to the host, whose defaults (latent size, crop 0) are the pipeline's.
    Raises ValueError for a CLIP that is not SDXL's, and for a text with half a surrogate pair.
    """
    tokens = reference_tokens(clip, text)
    sections = {name: [[(token, 1.0) for token in _filled(clip, name, part.ids)]] for name, part in tokens.items()}
    return Encoded(clip.encode_from_tokens_scheduled(sections), {name: part.lost for name, part in tokens.items()})


def reference_tokens(clip: Clip, text: str) -> dict[str, Tokens]:
    """The 77 tokens of each encoder. Raises as ``encode_reference``."""
    _require_characters(text)
    return {name: _tokens(_tokenizer(clip, name), text) for name in ENCODERS}


def is_empty(clip: Clip, text: str) -> bool:
    """Whether a text gives no token of its own, as blanks do."""
    _require_characters(text)
    return len(_tokenizer(clip, "l")(text)["input_ids"]) == 2


def zeros(conditioning: Conditioning) -> Conditioning:
    """The same conditioning with text and pooled text zero: diffusers' ``force_zeros_for_empty_prompt``."""
    return [
        [torch.zeros_like(text), {**rest, "pooled_output": torch.zeros_like(rest["pooled_output"])}]
        for text, rest in conditioning
    ]


def _filled(clip: Clip, name: str, ids: list[int]) -> list[int]:
    """As many tokens as the encoder has positions, which is 248 in LongCLIP: ComfyUI takes no fewer. What follows a
    token does not change it, and ComfyUI cuts both encoders' texts to the same length."""
    length: int = getattr(_host_tokenizer(clip, name), "max_length", PROMPT_TOKENS)
    return ids + ids[-1:] * (length - len(ids))


def _tokens(tokenizer: Any, text: str) -> Tokens:
    ids = tokenizer(text, padding="max_length", max_length=PROMPT_TOKENS, truncation=True)["input_ids"]
    return Tokens(ids, tokenizer.decode(tokenizer(text)["input_ids"][PROMPT_TOKENS - 1 : -1]))


def _host_tokenizer(clip: Clip, name: str) -> Any:
    """ComfyUI's own, around a transformers tokenizer; None where the CLIP is not SDXL's."""
    return vars(clip.tokenizer).get(ENCODERS[name])


def _tokenizer(clip: Clip, name: str) -> Any:
    """The transformers tokenizer that diffusers uses for an encoder."""
    own = getattr(_host_tokenizer(clip, name), "tokenizer", None)
    if own is None:
        raise ValueError(
            f"this CLIP is not SDXL's: it has no tokenizer {ENCODERS[name]}; expected the CLIP of a KOALA or SDXL "
            f"checkpoint. Connect KOALA Checkpoint Loader's CLIP, or set mode to comfy."
        )
    folder = Path(getattr(own, "name_or_path", ""))
    if not (folder / "vocab.json").is_file():
        raise ValueError(
            f"the CLIP's tokenizer {ENCODERS[name]} was not read from a folder with CLIP's vocabulary (found "
            f"{str(folder)!r}); expected ComfyUI's own. Set mode to comfy."
        )
    return _padded(own.__class__, folder, PADDING if name == "g" else END)


@cache
def _padded(kind: Any, folder: Path, padding: str) -> Any:
    return kind.from_pretrained(folder, pad_token=padding, local_files_only=True)


def _require_characters(text: str) -> None:
    """Raise ValueError for half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt has half a character (a lone surrogate) at position {error.start + 1}; "
            f"expected text in Unicode. Delete it, or paste the text again."
        ) from error
