"""Recognises from an image's pixels alone what it shows: the shape, its colour, the background's colour."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from tools.tiny.pictures import COLOUR_NAMES, PALETTE, SHAPE_NAMES, Drawings, draw

UNSURE = -1
SIZE = 64  # pixels: enough for judging
BORDER = 4  # pixels: background in every drawing
LEAST_AREA = 0.01  # share of the image: with a smaller foreground no colour is recognised
LEAST_OVERLAP = 0.7  # intersection over union below which a blob is not a shape


@dataclass(frozen=True)
class Verdict:
    """Index of each image's shape colour, background colour and shape, int64 [n]; UNSURE where there is none."""

    colour: torch.Tensor
    background: torch.Tensor
    shape: torch.Tensor


def judge(pictures: torch.Tensor) -> Verdict:
    """Judge images, float [n, 3, S, S] in [-1, 1]."""
    pixels = functional.interpolate(pictures.float(), size=(SIZE, SIZE), mode="area")
    frame = torch.ones(SIZE, SIZE, dtype=torch.bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    background = nearest(pixels[:, :, frame].median(dim=-1).values)
    inside = _erode(_distance(pixels, background) > 0.2)
    colour = _majority(nearest(pixels.movedim(1, -1)), inside)
    shape = _best_shape(_mask(pixels, colour, background), colour, background)
    colour = colour.where(inside.float().mean(dim=(1, 2)) >= LEAST_AREA, UNSURE)
    return Verdict(colour, background, shape)


def red_share(pictures: torch.Tensor) -> torch.Tensor:
    """Share of each image's pixels whose nearest colour is red, float [n]."""
    red = nearest(pictures.movedim(1, -1).float()) == COLOUR_NAMES.index("red")
    return red.float().mean(dim=(1, 2))


def nearest(pixels: torch.Tensor) -> torch.Tensor:
    """Index of the palette's colour nearest to each of pixels [..., 3] in [-1, 1]."""
    return torch.cdist((pixels.reshape(-1, 3) + 1) / 2, PALETTE).argmin(1).view(pixels.shape[:-1])


def _erode(mask: torch.Tensor) -> torch.Tensor:
    """Only pixels whose eight neighbours are in the mask as well: no anti-aliased edges."""
    return functional.max_pool2d((~mask).float().unsqueeze(1), 3, stride=1, padding=1).squeeze(1) == 0


def _majority(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The most frequent label inside each mask, int64 [n] (0 where the mask is empty)."""
    votes = functional.one_hot(labels, len(COLOUR_NAMES)) * mask.unsqueeze(-1)
    return votes.sum(dim=(1, 2)).argmax(1)


def _distance(pixels: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Distance of each of pixels [n, 3, s, s] from a colour per image (index [n]), in palette units."""
    return ((pixels + 1) / 2 - PALETTE[colour][:, :, None, None]).square().sum(1).sqrt()


def _mask(pixels: torch.Tensor, colour: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Pixels that are further from the background than half the distance to the shape's colour, bool [n, s, s]."""
    contrast = (PALETTE[colour] - PALETTE[background]).norm(dim=1).clamp(min=0.2)
    return _distance(pixels, background) > contrast[:, None, None] / 2


def _best_shape(masks: torch.Tensor, colour: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """The shape with the largest overlap, int64 [n]: each is drawn in these colours, at the centre and area of masks
    [n, s, s], and its own mask compared. (The colours matter: a koala's eyes may be holes in its mask.)"""
    n, shapes = len(masks), len(SHAPE_NAMES)
    area, x, y = (value.repeat_interleave(shapes) for value in _moments(masks.float()))
    colour, background = colour.repeat_interleave(shapes), background.repeat_interleave(shapes)
    shape, zero = torch.arange(shapes).repeat(n), torch.zeros(n * shapes)

    def masks_of(radius: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        drawings = Drawings(colour, background, shape, radius, x, y)
        return _mask(draw(drawings, SIZE), colour, background)

    model_area, model_x, model_y = _moments(masks_of(zero + 0.6, zero, zero).float())
    scale = (area / model_area.clamp(min=1e-6)).sqrt()
    drawn = masks_of((0.6 * scale).clamp(0.05, 2), x - model_x * scale, y - model_y * scale)
    drawn, mask = drawn.view(n, shapes, SIZE, SIZE), masks.unsqueeze(1)
    overlap = (drawn & mask).sum(dim=(2, 3)) / (drawn | mask).sum(dim=(2, 3)).clamp(min=1)
    best, shape = overlap.max(1)
    return shape.where(best >= LEAST_OVERLAP, UNSURE)


def _moments(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Area (share of the image) and centre (in half widths from the middle) of masks [n, s, s]."""
    size = masks.shape[-1]
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    weight = masks.sum(dim=(1, 2)).clamp(min=1e-6)
    return weight / size**2, (masks.sum(1) * axis).sum(1) / weight, (masks.sum(2) * axis).sum(1) / weight
