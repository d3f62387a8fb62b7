"""KOALA Prompt: in reference mode the tokens of diffusers' SDXL pipeline for any text, in comfy mode ComfyUI's."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from koala_sdxl.koala.styles import STYLES
from koala_sdxl.nodes.prompt import KoalaPrompt
from tools.measure import parity

LONG = ", ".join(["a gray koala on a green background"] * 12)
PIECES = (
    *("koala", "a red star", "don't", "I'LL", "embedding:absent", "embedding:", "x embedding:some", "a" * 40),
    *(" ", "  ", "\n", "\t", "\x00", "\x1c", "\x85", "\u200b", "\u3000", "\ufeff", "\xa0"),
    *("!", "!!", "(", ")", "\\(", "\\)", "\\", "((red:1.5))", "[x]", "{a|b}", "<b>", ",", ", ", ":", "_", "1.25"),
    *("<|endoftext|>", "<|EndOfText|>", "<|startoftext|>", "<|StartOfText|>", "</w>", "&amp;", "&#33;"),
    *("\u00e9", "e\u0301", "\u0130", "\u01c5", "\ufb01", "\u1e9e", "\u03a3\u03c2", "\u65e5\u672c", "\ud55c\uad6d"),
    *("\U0001f600", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u0661\u0662", "\u00bd"),
)


def tokens_of(text: str) -> dict[str, list[int]]:
    """What the node gives the two text encoders, by their names."""
    clip = copy.copy(parity.tiny_models()[1])
    given: list[Any] = []
    encode = clip.encode_from_tokens_scheduled

    def recorded(tokens: Any) -> Any:
        given.append(tokens)
        return encode(tokens)

    clip.encode_from_tokens_scheduled = recorded
    KoalaPrompt.execute(clip, text, "", "no style", "reference")
    assert all(len(sections) == 1 and {weight for _, weight in sections[0]} == {1.0} for sections in given[0].values())
    return {name: [token for token, _ in sections[0]] for name, sections in given[0].items()}


def wanted_tokens(text: str) -> dict[str, list[int]]:
    """What diffusers' pipeline gives them (pipeline_stable_diffusion_xl.py, encode_prompt)."""
    pipe = parity.tiny_pipeline()
    return {
        name: tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        for name, tokenizer in (("l", pipe.tokenizer), ("g", pipe.tokenizer_2))
    }


def lost_in_diffusers(text: str) -> list[str]:
    """The text that diffusers says each tokenizer cut."""
    pipe = parity.tiny_pipeline()
    return [tokenizer.decode(tokenizer(text).input_ids[76:-1]) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]


def random_text(seed: int) -> str:
    chosen = random.Random(seed)

    def piece() -> str:
        if chosen.random() < 0.9:
            return chosen.choice(PIECES)
        code = chosen.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    return chosen.choice(("", " ")).join(piece() for _ in range(chosen.choice((1, 3, 8, 20, 60))))


def said(positive: str, negative: str = "") -> str:
    made = KoalaPrompt.execute(parity.tiny_models()[1], positive, negative, "no style", "reference")
    return str(made.ui["text"][0])


@pytest.fixture
def some_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding ``some`` of two vectors, of koala-tiny's widths, where its tokenizers look for it."""
    save_file({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 64)}, tmp_path / "some.safetensors")
    tokenizer = parity.tiny_models()[1].tokenizer
    for part in (tokenizer.clip_l, tokenizer.clip_g):
        monkeypatch.setattr(part, "embedding_directory", [str(tmp_path)])


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_gives_the_tokens_of_diffusers(piece: str, some_embedding: None) -> None:
    for text in (piece, f"a {piece} b", f"{piece}{piece}", f"{LONG} {piece}", f"{piece} {LONG}"):
        assert tokens_of(text) == wanted_tokens(text), repr(text)


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_random_texts_give_the_tokens_of_diffusers(start: int, some_embedding: None) -> None:
    for seed in range(start, start + 100):
        text = random_text(seed)
        assert tokens_of(text) == wanted_tokens(text), repr(text)


@pytest.mark.parametrize(
    "text", ["a (red:1.5) circle", "(a red circle)", LONG, "a  RED   circle", "", "stop! now!!", r"a \(red\) circle"]
)
def test_reference_text_is_encoded_as_the_pipeline_encodes_it(text: str) -> None:
    conditioning = KoalaPrompt.execute(parity.tiny_models()[1], text, "", "no style", "reference").result[0]
    theirs, _, pooled, _ = parity.tiny_pipeline().encode_prompt(text, do_classifier_free_guidance=False)
    assert conditioning[0][0].shape == theirs.shape
    assert (conditioning[0][0] - theirs).abs().max() < 1e-4
    assert (conditioning[0][1]["pooled_output"] - pooled).abs().max() < 1e-4


def test_what_was_cut_is_said() -> None:
    first, second = lost_in_diffusers(LONG)
    assert first == second
    assert said(LONG, "red") == f"prompt cut after 77 tokens, lost: {first}"
    assert said("red", LONG) == f"negative cut after 77 tokens, lost: {first}"
    assert said(" ".join(["red"] * 75)) == "nothing was cut"
    assert said(" ".join(["red"] * 76)) == "prompt cut after 77 tokens, lost: red"


def test_each_encoder_s_loss_is_said_where_they_differ() -> None:
    """CLIP-G reads every exclamation mark as a token of its own."""
    text = "!!! " * 30
    first, second = lost_in_diffusers(text)
    assert (len(first), len(second)) == (0, 15)
    assert said(text) == f"prompt cut after 77 tokens, lost: nothing in CLIP-L, {second} in CLIP-G"


@pytest.mark.parametrize("start", range(0, 200, 100))
def test_what_random_texts_lose_is_what_diffusers_says(start: int) -> None:
    for seed in range(start, start + 100):
        text = random_text(seed) + random_text(seed + 1) + LONG
        assert all(lost in said(text) for lost in lost_in_diffusers(text)[:1]), repr(text)


def test_an_embedding_is_plain_text_and_that_is_said(some_embedding: None) -> None:
    """Also beyond the 77th token, where it was a KeyError."""
    for name in ("some", "absent"):
        text = f"{LONG}, embedding:{name} at the end"
        assert f"embedding:{name} is plain text in reference mode; comfy mode loads embeddings" in said(text)
        assert lost_in_diffusers(text)[0] in said(text)
    assert "plain text" not in said("a red star")


def test_comfy_mode_gives_what_clip_text_encode_gives(some_embedding: None) -> None:
    clip = parity.tiny_models()[1]
    for text in ("a (red:1.5) circle", f"{LONG}, embedding:some", "embedding:absent red", ""):
        made = KoalaPrompt.execute(clip, text, text, "no style", "comfy").result
        wanted = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        for side in made:
            assert torch.equal(side[0][0], wanted[0][0])
            assert torch.equal(side[0][1]["pooled_output"], wanted[0][1]["pooled_output"])


def test_an_empty_negative_becomes_zeros_only_in_reference_mode() -> None:
    clip = parity.tiny_models()[1]
    for blank in ("", "  ", "\n\u3000"):
        _, negative = KoalaPrompt.execute(clip, "red", blank, "no style", "reference").result
        assert not negative[0][0].any()
        assert not negative[0][1]["pooled_output"].any()
    for mode, text in (("comfy", ""), ("reference", "."), ("reference", "\x1c")):
        assert KoalaPrompt.execute(clip, "red", text, "no style", mode).result[1][0][0].any()


def test_half_a_character_is_refused_by_its_place() -> None:
    for sides in (("a \ud83d star", ""), ("a star", "a \ud83d star")):
        with pytest.raises(ValueError, match=r"half a character \(a lone surrogate\) at position 3; expected"):
            said(*sides)


def test_a_clip_without_sdxl_s_encoders_is_refused() -> None:
    clip = copy.copy(parity.tiny_models()[1])
    clip.tokenizer = copy.copy(clip.tokenizer)
    del clip.tokenizer.clip_g
    with pytest.raises(ValueError, match=r"this CLIP is not SDXL's: it has no tokenizer clip_g; expected"):
        KoalaPrompt.execute(clip, "red", "", "no style", "reference")


def test_styles_keep_the_person_s_text() -> None:
    for style in STYLES.values():
        positive, negative = style.apply("a \\(star\\)\x1c {prompt} ", "blue\x1c")
        assert "a \\(star\\)\x1c {prompt} " in positive
        assert negative.endswith("blue\x1c")
        assert style.apply("", "  ")[1].strip() == style.negative
