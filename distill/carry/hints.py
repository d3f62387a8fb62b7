"""Control images: a folder's, in order of their names, one for each prompt that is sampled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import images
from ..errors import UserError
from .samples import drawn
from .settings import HELD_OUT, Settings

READ = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Hints:
    """Those that are used: RGB, uint8 [n, 3, size, size]; the numbers of those that each network samples with to learn
    from, and of those held out; and what tells them from others."""

    images: Tensor
    turns: tuple[list[int], list[int]]
    digest: str


def open_hints(given: Settings) -> Hints:
    """Read the control images that a run uses. As with prompts, every fourth is held out, and of too many some are
    used, from all over the folder.

    Raises UserError where there is no such folder, where it has too few images, or where one cannot be read.
    """
    files = _files(given.hints)
    turns = drawn(given, len(files), 0)
    used = sorted({*turns[0], *turns[1]})
    contents = [_content(files[number]) for number in used]
    found = [_pixels(content, files[number], given.size) for content, number in zip(contents, used, strict=True)]
    digests = "".join(hashlib.sha256(content).hexdigest() for content in contents)
    learned, held_out = ([used.index(number) for number in numbers] for numbers in turns)
    return Hints(torch.stack(found), (learned, held_out), hashlib.sha256(digests.encode()).hexdigest())


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        raise UserError(
            "--hints is missing; expected a folder of control images for the ControlNet, such as outlines or depth "
            "maps. Give one."
        )
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in READ and path.name[0] != ".")
    except OSError as error:
        raise UserError(
            f"--hints: {folder} cannot be read ({error.strerror}); expected a folder of control images."
        ) from None
    if len(found) < HELD_OUT:
        raise UserError(
            f"--hints: {folder} has {len(found)} images ({', '.join(READ)}); expected at least {HELD_OUT}. Add some: "
            f"every {HELD_OUT}th is held out, to measure."
        )
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--hints: {path} cannot be read ({error.strerror}); expected an image. Remove it, or make it readable."
        ) from None


def _pixels(content: bytes, path: Path, size: int) -> Tensor:
    """uint8 [3, size, size]: its middle, scaled as ComfyUI scales a ControlNet's image."""
    try:
        image = images.decode(content)
    except images.Unusable as error:
        raise UserError(
            f"--hints: {path}: {error}; expected a PNG, JPEG or WebP image. Remove or replace it."
        ) from None
    side = min(image.size)
    left, top = (round((length - side) / 2) for length in image.size)
    middle = image.crop((left, top, image.width - left, image.height - top))
    pixels = torch.from_numpy(np.array(middle)).permute(2, 0, 1).unsqueeze(0)
    return functional.interpolate(pixels, (size, size), mode="nearest-exact")[0]
