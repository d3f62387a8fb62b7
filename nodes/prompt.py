"""Text into conditioning: KOALA Prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping

from comfy_api.latest import io

from ..host.prompt import encode_reference, is_empty, zeros
from ..host.protocols import Clip
from ..koala.architecture.components import PROMPT_TOKENS
from ..koala.styles import STYLES
from ..koala.words import joined, lines, message
from .base import CATEGORY, SHOWS, shown

EMBEDDING = re.compile(r"(?<!\S)embedding:[^\s,]+")
"""An embedding, as comfy mode would find it."""


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
            return shown(message("comfy: weights and long prompts as ComfyUI encodes them"), *encoded)
        first, second = encode_reference(clip, positive), encode_reference(clip, negative)
        conditioning = zeros(second.conditioning) if is_empty(clip, negative) else second.conditioning
        said = [
            message(
                "{prompt} cut after {count} tokens, lost: {words}",
                prompt=which,
                count=PROMPT_TOKENS,
                words=_lost(encoded.lost),
            )
            for which, encoded in ((message("prompt"), first), (message("negative"), second))
            if any(encoded.lost.values())
        ] or [message("nothing was cut")]
        return shown(lines(*said, *_literal_embeddings(positive, negative)), first.conditioning, conditioning)


def _lost(lost: Mapping[str, str]) -> str:
    """What the encoders did not get; each by itself where they differ in more than blanks."""
    if len({"".join(text.split()) for text in lost.values()}) == 1:
        return lost["l"]
    return joined(
        ", ",
        (
            message("{words} in CLIP-{encoder}", words=text or message("nothing"), encoder=name.upper())
            for name, text in lost.items()
        ),
    )


def _literal_embeddings(*texts: str) -> list[str]:
    """A line for each embedding that is written in the texts."""
    names = dict.fromkeys(name for text in texts for name in EMBEDDING.findall(text))
    return [message("{name} is plain text in reference mode; comfy mode loads embeddings", name=name) for name in names]
