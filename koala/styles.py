"""Prompt styles: the style names of the KOALA authors' demo, in words of our own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """Words put around a prompt: ``{prompt}`` is where the person's own text goes."""

    positive: str
    negative: str = ""

    def apply(self, positive: str, negative: str) -> tuple[str, str]:
        """Positive and negative prompt with the style's words around the person's own."""
        if self.negative:
            negative = f"{self.negative}, {negative}" if negative.strip() else self.negative
        return self.positive.replace("{prompt}", positive), negative


STYLES: dict[str, Style] = {
    "no style": Style("{prompt}"),
    "Cinematic": Style(
        "a still from a feature film: {prompt}, anamorphic lens, shallow focus, colour graded, soft haze, film grain",
        "drawing, cartoon, caption, watermark, flat lighting",
    ),
    "Photographic": Style(
        "a photograph of {prompt}, 50 mm lens, natural light, sharp subject, soft background, fine detail",
        "painting, sketch, illustration, render, oversmoothed skin",
    ),
    "Anime": Style(
        "{prompt}, anime illustration, clean line art, cel shading, bright palette, key visual",
        "photograph, realism, muddy colours, low contrast",
    ),
    "Manga": Style(
        "{prompt}, black ink manga page, screentone, speed lines, dynamic composition",
        "photograph, colour, blurry lines, western comic",
    ),
    "Digital Art": Style(
        "{prompt}, digital painting, concept art, visible brushwork, rich light, detailed",
        "photograph, noise, amateur sketch",
    ),
    "Pixel art": Style(
        "{prompt}, pixel art, 16-bit game sprite, limited palette, hard edges",
        "photograph, smooth gradient, anti-aliasing, realistic texture",
    ),
    "Fantasy art": Style(
        "{prompt}, high fantasy illustration, luminous mist, ornate detail, epic scale, oil painting",
        "photograph, modern clothes, plain background, text",
    ),
    "Neonpunk": Style(
        "{prompt}, neon-lit cyberpunk city mood, magenta and cyan glow, wet reflections, deep shadows",
        "daylight, pastel, watercolour, washed out",
    ),
    "3D Model": Style(
        "{prompt}, polished 3D render, physically based materials, studio lighting, ambient occlusion",
        "flat shading, sketch, low polygon count, noise",
    ),
}
"""Name on the node -> style."""
