"""Text into conditioning: KOALA Prompt."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..host.protocols import Clip, Conditioning
from ..koala.styles import STYLES
from .base import CATEGORY, SHOWS, shown


class KoalaPrompt(io.ComfyNode):
    """Encodes prompt and negative prompt, as diffusers does or as ComfyUI does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaPrompt",
            display_name="KOALA Prompt",
            category=CATEGORY,
            description="Encodes a prompt and a negative prompt. The mode reference matches diffusers: 77 tokens, "
            "literal brackets, zeros for an empty negative prompt.",
            search_aliases=["koala prompt", "koala text encode", "sdxl prompt", "style prompt", "negative prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="CLIP of a KOALA or SDXL checkpoint."),
                io.String.Input(
                    "positive", multiline=True, dynamic_prompts=True, tooltip="What the image should show."
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the image should not show. Optional.",
                ),
                io.Combo.Input(
                    "style",
                    options=list(STYLES),
                    default=next(iter(STYLES)),
                    tooltip="Adds a style's words around the prompt and before the negative prompt.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["reference", "comfy"],
                    default="reference",
                    advanced=True,
                    tooltip="reference: as in diffusers, with prompts cut after 77 tokens, literal brackets and zeros "
                    "for an empty negative prompt. comfy: (word:1.2) weights, embeddings and prompts of any length.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="Conditioning towards the prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="Conditioning away from the negative prompt."),
            ],
            **SHOWS,
        )

    @classmethod
    def execute(cls, clip: Clip, positive: str, negative: str, style: str, mode: str) -> io.NodeOutput:
        positive, negative = STYLES[style].apply(positive, negative)
        if mode == "comfy":
            encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (positive, negative)]
            return shown("comfy: weights and long prompts as ComfyUI encodes them", *encoded)
        first, cut = encode_reference(clip, positive)
        second, cut_negative = encode_reference(clip, negative)
        if not negative.strip():
            second = zeros(second)
        losses = [
            f"{which} cut after 77 tokens, lost: {lost}"
            for which, lost in (("prompt", cut), ("negative", cut_negative))
            if lost
        ]
        return shown("\n".join(losses) or "nothing was cut", first, second)


def encode_reference(clip: Clip, text: str) -> tuple[Conditioning, str]:
    """Encode as diffusers' SDXL pipeline: one section of 77 tokens, no weights.

    Size conditioning is left to the host, whose defaults (latent size, crop 0) are the pipeline's.
    Returns the conditioning and the text that did not fit.
    """
    tokens = clip.tokenize(text, disable_weights=True)
    rest = [pair for section in tokens["l"][1:] for pair in section]
    conditioning = clip.encode_from_tokens_scheduled({name: sections[:1] for name, sections in tokens.items()})
    return conditioning, _words(clip, rest)


def zeros(conditioning: Conditioning) -> Conditioning:
    """The same conditioning with text and pooled text zero: diffusers' ``force_zeros_for_empty_prompt``."""
    return [
        [torch.zeros_like(text), {**rest, "pooled_output": torch.zeros_like(rest["pooled_output"])}]
        for text, rest in conditioning
    ]


def _words(clip: Clip, pairs: list[tuple[Any, ...]]) -> str:
    """Tokens back to text; start, end and padding tokens vanish."""
    pieces = (piece for _, piece in clip.tokenizer.untokenize(pairs))
    return "".join(piece for piece in pieces if not piece.startswith("<|")).replace("</w>", " ").strip()
