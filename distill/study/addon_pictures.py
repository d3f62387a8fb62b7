"""What the add-ons of sdxl-tiny draw, and judges that see in a picture's pixels whether they did.

The LoRA knows one more colour, cyan, by a word that no model here knows by itself. The ControlNet draws a shape where,
and as large as, an outline says.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from tools.tiny import judge
from tools.tiny.pictures import COLOUR_NAMES, COLOURS, PALETTE, Drawings, draw

CYAN = torch.tensor([0.20, 0.90, 0.90])
COLOURED = 0.7  # least share of cyan in what stands out; a koala's eyes and nose are not cyan
LEAST_DISTANCE = 0.2  # from the background, in palette units: what is nearer is background


def in_cyan(drawings: Drawings, size: int) -> torch.Tensor:
    """The drawings with their shapes cyan, float32 [n, 3, size, size] in [-1, 1]."""
    # A picture is linear in its shape's colour; white on black shows by how much, eyes and edges included.
    light, dark = COLOURS["white"][0], COLOURS["black"][0]
    share = ((_red(_recoloured(drawings, "white", "black"), size) - dark) / (light - dark)).clamp(0, 1)
    change = (CYAN - PALETTE[drawings.colour]).view(-1, 3, 1, 1)
    return draw(drawings, size) + 2 * share * change


def saying_cyan(said: str, colour: int) -> str:
    """A caption that names a shape's colour, with cyan in its place."""
    name = COLOUR_NAMES[colour]
    return said.replace(f"an {name}", f"a {name}").replace(name, "cyan", 1)


def silhouettes(drawings: Drawings, size: int) -> torch.Tensor:
    """How much of each pixel a shape covers, float32 [n, 1, size, size]."""
    # Of purple, whose eyes are white, every part of a shape has more red than the black around it.
    purple, dark = COLOURS["purple"][0], COLOURS["black"][0]
    return ((_red(_recoloured(drawings, "purple", "black"), size) - dark) / (purple - dark)).clamp(0, 1)


def outlines(drawings: Drawings, size: int) -> torch.Tensor:
    """White outlines on black, what the ControlNet is shown: float32 [n, 3, size, size] in [0, 1]."""
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
    """What is seen in n pictures that should be of cyan shapes: whether they are, bool [n]; the share of cyan in what
    stands out, float [n]; background and shape as int64 [n]."""

    cyan: torch.Tensor
    share: torch.Tensor
    background: torch.Tensor
    shape: torch.Tensor


def judge_cyan(pictures: torch.Tensor) -> Coloured:
    """pictures: float [n, 3, S, S] in [-1, 1]."""
    pixels = _small(pictures)
    colours = torch.cat([PALETTE, CYAN[None]]) * 2 - 1
    nearest = torch.cdist(pixels.movedim(1, -1).reshape(-1, 3), colours).argmin(1).view(len(pixels), *pixels.shape[-2:])
    cyan, seen = nearest == len(PALETTE), _standing_out(pixels)
    share = (cyan & seen).sum(dim=(1, 2)) / seen.sum(dim=(1, 2)).clamp(min=1)
    background = judge.judge(pixels).background
    # The judge knows no cyan: with another colour in its place, not the background's nor an eye's, it says the shape.
    red, green = (COLOUR_NAMES.index(name) for name in ("red", "green"))
    painted = _painted(pixels, cyan, torch.where(background == red, green, red))
    return Coloured(share >= COLOURED, share, background, judge.judge(painted).shape)


def overlaps(pictures: torch.Tensor, drawings: Drawings) -> torch.Tensor:
    """Intersection over union of what stands out in pictures [n, 3, S, S] in [-1, 1] and the drawings' silhouettes,
    float [n]."""
    drawn = silhouettes(drawings, judge.SIZE).squeeze(1) > 0.5
    seen = _standing_out(_small(pictures))
    return (drawn & seen).sum(dim=(1, 2)) / (drawn | seen).sum(dim=(1, 2)).clamp(min=1)


def _small(pictures: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(pictures.float(), size=(judge.SIZE, judge.SIZE), mode="area")


def _painted(pixels: torch.Tensor, mask: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Pixels with the masked ones [n, s, s] in each picture's colour (index [n])."""
    return torch.where(mask.unsqueeze(1), PALETTE[colour].view(-1, 3, 1, 1) * 2 - 1, pixels)


def _standing_out(pixels: torch.Tensor) -> torch.Tensor:
    """Where pixels are further from their border's colour than half as far as most that differ, bool [n, s, s]."""
    frame = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    frame[judge.BORDER : -judge.BORDER, judge.BORDER : -judge.BORDER] = False
    background = pixels[:, :, frame].median(dim=-1).values
    distance = (pixels - background[:, :, None, None]).square().sum(1).sqrt() / 2
    typical = distance.where(distance > LEAST_DISTANCE, torch.nan).flatten(1).nanmedian(dim=1).values
    return distance > typical.view(-1, 1, 1) / 2  # nothing, where nothing differs and there is no median
