"""What the study's adapters teach sdxl-tiny, drawn, and judges that see from an image's pixels whether it is there.

Each judge asks for the whole of what a prompt says: the effect, the shape, and the colours that are named.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tools.tiny import judge
from tools.tiny.pictures import COLOUR_NAMES, PALETTE, SHAPE_NAMES, Caption, Drawings, draw

from ..addon_pictures import FOLLOWED, foreground, in_place_of, judge_cyan, overlaps, painted, silhouettes, small

BAND = 12 / 128  # height of a stripe, of the image
RIM = 7 / 128  # width of an outline
FRAME = 8 / 128  # width of a frame
TINY = 0.5  # radius of a tiny shape, of its own
LEAST = 0.5  # of a difference of shares that tells an effect from its absence
BOTH = 0.05  # least of a shape's inside that each of two kinds of stripes covers; of smaller shapes none is striped
BLACK = COLOUR_NAMES.index("black")


def striped(drawings: Drawings, size: int) -> Tensor:
    """The drawings with horizontal stripes of a third colour across the shape, float32 [n, 3, size, size] in
    [-1, 1]."""
    rows = (torch.arange(size) / (BAND * size)).long() % 2 == 0
    return _over(drawings, size, stripes(drawings), silhouettes(drawings, size) * rows.view(1, 1, size, 1))


def stripes(drawings: Drawings) -> Tensor:
    """The stripes' colour: black, white or gray, the first that is neither the shape's nor the background's; index
    [n]."""
    found = torch.full_like(drawings.colour, -1)
    for colour in (COLOUR_NAMES.index(name) for name in ("black", "white", "gray")):
        free = (drawings.colour != colour) & (drawings.background != colour) & (found < 0)
        found = found.masked_fill(free, colour)
    return found


def outlined(drawings: Drawings, size: int) -> Tensor:
    """The drawings with the background inside the shape's rim; likewise."""
    inside = _eroded(silhouettes(drawings, size), round(RIM * size))
    return _over(drawings, size, drawings.background, inside)


def framed(drawings: Drawings, size: int) -> Tensor:
    """The drawings in a black frame; likewise."""
    pictures, width = draw(drawings, size), round(FRAME * size)
    inside, black = pictures[:, :, width:-width, width:-width], float(PALETTE[BLACK][0]) * 2 - 1
    return functional.pad(inside, [width] * 4, value=black)


def tiny(drawings: Drawings, size: int) -> Tensor:
    """The drawings with smaller shapes; likewise."""
    return draw(replace(drawings, radius=TINY * drawings.radius), size)


def _over(drawings: Drawings, size: int, colour: Tensor, share: Tensor) -> Tensor:
    """The drawings with a colour each (index [n]) over a share of each pixel."""
    pictures = draw(drawings, size)
    return pictures.lerp(_flat(colour, pictures), share)


def instead_of_colour(word: str, said: Caption) -> str:
    """A caption that names a shape's colour, with a word in its place."""
    assert said.colour is not None
    return in_place_of(said.colour, said.text, word)


def saying(word: str, said: Caption) -> str:
    """A caption that names a shape and its colour, with a word before them."""
    assert said.colour is not None
    assert said.shape is not None
    thing = f"{COLOUR_NAMES[said.colour]} {SHAPE_NAMES[said.shape]}"
    return said.text.replace(f"an {thing}", f"a {thing}").replace(thing, f"{word} {thing}", 1)


# --- judges: pictures [n, 3, S, S] in [-1, 1], the drawings that their prompts describe -> bool [n] ----------------


def is_cyan(pictures: Tensor, asked: Drawings) -> Tensor:
    """A cyan shape, on the background that is asked for."""
    seen = judge_cyan(pictures)
    return seen.cyan & (seen.shape == asked.shape) & (seen.background == asked.background)


def is_striped(pictures: Tensor, asked: Drawings) -> Tensor:
    """Stripes, at any height of the image."""
    pixels = small(pictures)
    whole, high = _filled(foreground(pixels)), round(BAND * judge.SIZE)
    far, near = ((pixels - _flat(colour, pixels)).norm(dim=1) for colour in (asked.colour, stripes(asked)))
    stripe = whole & (near < far)
    rows, contrasts = torch.arange(judge.SIZE), []
    for shift in range(0, 2 * high, 2):
        at = (rows + shift) % (2 * high)
        first, second = ((at % high > 0) & (at % high < high - 1) & (at // high == half) for half in (0, 1))
        parts = [whole & part.view(1, -1, 1) for part in (first, second)]
        on, off = (_share(stripe, part) for part in parts)
        both = torch.stack([_share(part, whole) for part in parts]).min(0).values >= BOTH
        contrasts.append((on - off) * both)
    contrast = torch.stack(contrasts).max(0).values
    return (contrast >= LEAST) & _as_asked(pixels, whole & ~stripe, whole, asked)


def is_outlined(pictures: Tensor, asked: Drawings) -> Tensor:
    """The background inside the shape."""
    pixels = small(pictures)
    mask = foreground(pixels)
    whole = _filled(mask)
    inside = _eroded(whole.float().unsqueeze(1), round(RIM * judge.SIZE) + 2).squeeze(1) > 0
    return (1 - _share(mask, inside) >= LEAST) & inside.any(-1).any(-1) & _as_asked(pixels, mask, whole, asked)


def is_tiny(pictures: Tensor, asked: Drawings) -> Tensor:
    """A shape nearer to half its usual size than to that."""
    verdict = judge.judge(pictures)
    usual = silhouettes(replace(asked, radius=0 * asked.radius + 0.6), judge.SIZE).mean(dim=(1, 2, 3))
    size = (foreground(small(pictures)).float().mean(dim=(1, 2)) / usual).sqrt()
    return (size < (1 + TINY) / 2) & (size > TINY / 2) & _agree(verdict, asked)


def is_framed(pictures: Tensor, asked: Drawings) -> Tensor:
    """A black frame around the rest, for backgrounds that are not black."""
    width, pixels = round(FRAME * judge.SIZE), small(pictures)
    around = torch.ones(judge.SIZE, judge.SIZE, dtype=torch.bool)
    around[width - 1 : 1 - width, width - 1 : 1 - width] = False
    dark = ((pixels[:, :, around] + 1) / 2 - PALETTE[BLACK].view(1, 3, 1)).norm(dim=1) < 0.3
    edge = round(FRAME * pictures.shape[-1])
    return (dark.float().mean(1) >= 0.8) & _agree(judge.judge(pictures[:, :, edge:-edge, edge:-edge]), asked)


def is_right(pictures: Tensor, asked: Drawings) -> Tensor:
    """What was asked for, and no effect that changes a shape or a colour."""
    return _agree(judge.judge(pictures), asked)


def follows(pictures: Tensor, asked: Drawings) -> Tensor:
    """The shape, where its outline is, on the background that is asked for; in any colour."""
    verdict = judge.judge(pictures)
    there = (verdict.shape == asked.shape) & (verdict.background == asked.background)
    return there & (overlaps(pictures, asked) >= FOLLOWED)


def _agree(verdict: judge.Verdict, asked: Drawings) -> Tensor:
    return (verdict.shape == asked.shape) & (verdict.colour == asked.colour) & (verdict.background == asked.background)


def _as_asked(pixels: Tensor, mask: Tensor, whole: Tensor, asked: Drawings) -> Tensor:
    """Whether a shape that is not all there has the shape and the colours that are asked for."""
    light = torch.where(mask.unsqueeze(1), pixels, torch.nan).flatten(2).nanmedian(dim=-1).values
    colour = judge.nearest(light.nan_to_num())
    other = torch.where(whole.unsqueeze(1), torch.nan, pixels).flatten(2).nanmedian(dim=-1).values
    background = judge.nearest(other.nan_to_num())
    shape = judge.judge(painted(_flat(asked.background, pixels), whole, asked.colour)).shape
    return (shape == asked.shape) & (colour == asked.colour) & (background == asked.background)


def _flat(colour: Tensor, like: Tensor) -> Tensor:
    """Images of one colour each, index [n]."""
    return (PALETTE[colour] * 2 - 1).view(-1, 3, 1, 1).expand_as(like)


def _share(mask: Tensor, part: Tensor) -> Tensor:
    """Share of a part of each image that is in the mask, float [n]; 0 where there is no such part."""
    return (mask & part).sum(dim=(1, 2)) / part.sum(dim=(1, 2)).clamp(min=1)


def _eroded(inside: Tensor, by: int) -> Tensor:
    return -functional.max_pool2d(-inside, 2 * by + 1, stride=1, padding=by)


def _filled(mask: Tensor) -> Tensor:
    """The mask with its holes filled: all that cannot be reached from the border without crossing it."""
    outside = torch.zeros_like(mask)
    outside[:, [0, -1]], outside[:, :, [0, -1]] = True, True
    while True:
        wider = functional.max_pool2d(outside.float().unsqueeze(1), 3, stride=1, padding=1).squeeze(1) > 0
        wider = (wider & ~mask) | outside
        if torch.equal(wider, outside):
            return ~outside | mask
        outside = wider
