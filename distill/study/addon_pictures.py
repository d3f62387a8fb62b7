"""Training images for the add-ons of sdxl-tiny, and judges that see from an image's pixels whether an add-on worked.

The LoRA teaches one more colour, cyan, by a word that the models do not know. The ControlNet draws a shape with the
place and size of an outline.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from tools.tiny import judge
from tools.tiny.pictures import COLOUR_NAMES, COLOURS, PALETTE, Drawings, draw

CYAN = torch.tensor([0.20, 0.90, 0.90])
COLOURED = 0.7  # least share of cyan in the foreground; a koala's eyes and nose are not cyan
FOLLOWED = 0.7  # least intersection over union of a shape that follows its outline
LEAST_DISTANCE = 0.2  # of the foreground from the background's colour, in palette units


def in_cyan(drawings: Drawings, size: int) -> torch.Tensor:
    """The drawings with their shapes cyan, float32 [n, 3, size, size] in [-1, 1]."""
    # An image is linear in its shape's colour; white on black gives the factor, eyes and edges included.
    light, dark = COLOURS["white"][0], COLOURS["black"][0]
    share = ((_red(_recoloured(drawings, "white", "black"), size) - dark) / (light - dark)).clamp(0, 1)
    change = (CYAN - PALETTE[drawings.colour]).view(-1, 3, 1, 1)
    return draw(drawings, size) + 2 * share * change


def saying_cyan(said: str, colour: int) -> str:
    """A caption that names a shape's colour, with that replaced by cyan."""
    return in_place_of(colour, said, "cyan")


def in_place_of(colour: int, said: str, word: str) -> str:
    """A caption that names a shape's colour, with that replaced by a word."""
    name = COLOUR_NAMES[colour]
    return said.replace(f"an {name}", f"a {name}").replace(name, word, 1)


def silhouettes(drawings: Drawings, size: int) -> torch.Tensor:
    """How much of each pixel a shape covers, float32 [n, 1, size, size]."""
    # For purple, whose eyes are white, every pixel of a shape has more red than the black around it.
    purple, dark = COLOURS["purple"][0], COLOURS["black"][0]
    return ((_red(_recoloured(drawings, "purple", "black"), size) - dark) / (purple - dark)).clamp(0, 1)


def outlines(drawings: Drawings, size: int) -> torch.Tensor:
    """White outlines on black, the ControlNet's hints: float32 [n, 3, size, size] in [0, 1]."""
    inside = silhouettes(drawings, size)
    grown, shrunk = (functional.max_pool2d(sign * inside, 3, stride=1, padding=1) for sign in (1, -1))
    return (grown + shrunk).expand(-1, 3, -1, -1)


def _recoloured(drawings: Drawings, colour: str, background: str) -> Drawings:
    whole = torch.ones_like(drawings.colour)
    return replace(
        drawings,
        colour=whole * COLOUR_NAMES.index(colour),
        background=whole * COLOUR_NAMES.index(background),
    )


def _red(drawings: Drawings, size: int) -> torch.Tensor:
    return (draw(drawings, size)[:, :1] + 1) / 2


@dataclass(frozen=True)
class Coloured:
    """Verdicts on n images that should show cyan shapes."""

    cyan: torch.Tensor
    """Whether the shape is cyan, bool [n]."""
    share: torch.Tensor
    """Share of cyan in the foreground, float [n]."""
    background: torch.Tensor
    """Colour index, int64 [n]."""
    shape: torch.Tensor
    """Shape index, int64 [n]."""


def judge_cyan(pictures: torch.Tensor) -> Coloured:
    """Judge images, float [n, 3, S, S] in [-1, 1]."""
    pixels = small(pictures)
    colours = torch.cat([PALETTE, CYAN[None]]) * 2 - 1
    nearest = torch.cdist(pixels.movedim(1, -1).reshape(-1, 3), colours).argmin(1).view(len(pixels), *pixels.shape[-2:])
    cyan, seen = nearest == len(PALETTE), foreground(pixels)
    share = (cyan & seen).sum(dim=(1, 2)) / seen.sum(dim=(1, 2)).clamp(min=1)
    background = judge.judge(pixels).background
    # The judge does not know cyan: it recognises the shape in another colour, neither the background's nor an eye's.
    red, green = (COLOUR_NAMES.index(name) for name in ("red", "green"))
    known = painted(pixels, cyan, torch.where(background == red, green, red))
    return Coloured(share >= COLOURED, share, background, judge.judge(known).shape)


def overlaps(pictures: torch.Tensor, drawings: Drawings) -> torch.Tensor:
    """Intersection over union of the foreground of images, [n, 3, S, S] in [-1, 1], and the drawings' silhouettes;
    float [n]."""
    drawn = silhouettes(drawings, judge.SIZE).squeeze(1) > 0.5
    seen = foreground(small(pictures))
    return (drawn & seen).sum(dim=(1, 2)) / (drawn | seen).sum(dim=(1, 2)).clamp(min=1)


def small(pictures: torch.Tensor) -> torch.Tensor:
    """Images as small as they are judged, float [n, 3, s, s]."""
    return functional.interpolate(pictures.float(), size=(judge.SIZE, judge.SIZE), mode="area")


def painted(pixels: torch.Tensor, mask: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Pixels with the masked ones, [n, s, s], in each image's colour (index [n])."""
    return torch.where(mask.unsqueeze(1), PALETTE[colour].view(-1, 3, 1, 1) * 2 - 1, pixels)


def foreground(pixels: torch.Tensor) -> torch.Tensor:
    """The foreground, bool [n, s, s]: pixels whose distance from the border's colour is more than half the median of
    those that differ from it."""
    frame = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    frame[judge.BORDER : -judge.BORDER, judge.BORDER : -judge.BORDER] = False
    background = pixels[:, :, frame].median(dim=-1).values
    distance = (pixels - background[:, :, None, None]).square().sum(1).sqrt() / 2
    typical = distance.where(distance > LEAST_DISTANCE, torch.nan).flatten(1).nanmedian(dim=1).values
    return distance > typical.view(-1, 1, 1) / 2  # all False where nothing differs: the median is NaN
