"""Image files as the trainer decodes them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from koala_sdxl.distill import images
from tests.dev.distill_pictures import encoded, noise, picture


@pytest.mark.parametrize("quality", [30, 60, 75, 90, 95])
def test_the_quality_of_a_jpeg_is_estimated(quality: int) -> None:
    assert images.jpeg_quality(encoded(noise(), "JPEG", quality=quality)) == quality
    assert images.jpeg_quality(encoded(noise())) == 0


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (picture(mode="RGBA", colour=(255, 0, 0, 0)), (255, 255, 255)),
        (picture(mode="RGBA", colour=(255, 0, 0, 128)), (255, 127, 127)),
        (picture(mode="LA", colour=(0, 0)), (255, 255, 255)),
        (picture(mode="L", colour=77), (77, 77, 77)),
        (picture(mode="1", colour=1), (255, 255, 255)),
        (picture().convert("P", palette=Image.Palette.ADAPTIVE), (200, 40, 40)),
        (Image.fromarray(np.full((64, 64), 77 * 257, np.uint16)), (77, 77, 77)),
    ],
    ids=["transparent", "half", "grey with alpha", "grey", "one bit", "palette", "16 bits"],
)
def test_every_kind_of_pixel_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    found = images.decode(encoded(image))
    assert (found.mode, found.size) == ("RGB", (64, 64))
    assert np.abs(np.array(found.getpixel((32, 32))) - expected).max() <= 1


def test_cmyk_becomes_rgb() -> None:
    found = images.decode(encoded(picture(mode="CMYK", colour=(0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.array(found.getpixel((32, 32))) - (255, 0, 0)).max() <= 8


def test_a_palette_with_a_transparent_colour_is_put_on_white() -> None:
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    found = images.decode(encoded(image, transparency=image.getpixel((0, 0))))
    assert found.getpixel((32, 32)) == (255, 255, 255)


def test_a_picture_is_turned_as_its_exif_says() -> None:
    image = picture(40, 20, (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    found = images.decode(encoded(image, exif=exif))
    assert found.size == (20, 40)
    assert (found.getpixel((10, 5)), found.getpixel((10, 35))) == ((255, 255, 255), (0, 0, 0))
