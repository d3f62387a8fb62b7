"""Image files: which are read, their pixels, and how strongly a JPEG is compressed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

COMMON = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow opens and leaves to other programs to decode."""
Image.init()
EXTENSIONS = (
    *COMMON,
    *sorted(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in NOT_DECODED and extension not in COMMON
    ),
)
"""Those of every format that this Pillow reads; where a sample has several images, the first one counts."""
LISTED = ".png, .jpg, .webp or another format that Pillow reads"
LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
"""JPEG's example table of quantisation (ITU-T T.81, table K.1), which libjpeg scales by quality (jcparam.c)."""


class Unusable(Exception):
    """One image that cannot be used; the message says why."""


def decode(content: bytes) -> Image.Image:
    """A file's image as RGB: rotated as its EXIF data says, transparency on white, 16-bit grey scaled to 8 bits, of an
    animation the first frame.

    Raises Unusable for what is not an image, or not a complete one.
    """
    if not content:
        raise Unusable("the file is empty")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library may have set it; missing parts would then be grey
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return _rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:  # its text is an object's address
        raise Unusable("this is not an image, or not in a known format") from None
    except Exception as error:  # decoders raise nearly anything for damaged files: OSError, SyntaxError, ValueError
        raise Unusable(f"the image cannot be decoded ({first_line(error)})") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip at 255
        return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def jpeg_quality(content: bytes) -> int:
    """The quality, 1 to 100, at which libjpeg quantises as an image file is quantised, or nearly; 0 for what is not a
    JPEG. ``content`` is one that ``decode`` takes."""
    with Image.open(io.BytesIO(content)) as opened:
        tables = getattr(opened, "quantization", None)
    if not tables:
        return 0
    found = sum(tables[min(tables)])
    return min(range(1, 101), key=lambda quality: abs(_SUMS[quality] - found))


def _sum(quality: int) -> int:
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return sum(min(255, max(1, (value * scale + 50) // 100)) for value in LUMINANCE)


_SUMS = [0, *(_sum(quality) for quality in range(1, 101))]


def first_line(error: Exception) -> str:
    """An error's message, without the open file and its name, which WebDataset adds."""
    said = (isinstance(error, OSError) and error.strerror) or next(iter(error.args), "")
    return next(iter(str(said).partition(" @ <")[0].splitlines()), type(error).__name__)
