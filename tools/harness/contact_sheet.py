"""Pictures in a grid, each with its caption under it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
LEAST_SIDE = 160  # pixels: room for a caption
CAPTION_HEIGHT = 36  # pixels: two lines of text
MARGIN = 8


def contact_sheet(pictures: Sequence[bytes], captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """All pictures, of which there is at least one, in a grid."""
    columns = min(columns, len(pictures))
    opened = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    side = max(LEAST_SIDE, *(max(picture.size) for picture in opened))
    rows = -(-len(opened) // columns)
    across, down = side + MARGIN, side + CAPTION_HEIGHT + MARGIN
    sheet = Image.new("RGB", (columns * across + MARGIN, rows * down + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for number, (picture, caption) in enumerate(zip(opened, captions, strict=True)):
        left, top = MARGIN + number % columns * across, MARGIN + number // columns * down
        sheet.paste(picture, (left + (side - picture.width) // 2, top + side - picture.height))
        pen.multiline_text((left, top + side + 4), wrapped(caption, font, side), fill="black", font=font)
    return sheet


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
