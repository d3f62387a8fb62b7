"""The drawings on which koala-tiny is trained, and their captions: a coloured shape on a coloured background.

A drawing is defined by a few numbers (`Drawings`), so that a seed defines a data set. Edges are anti-aliased from
signed distances in pixels, so that the same drawing can be rendered at any size.
"""

import math
from dataclasses import dataclass

import torch

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.55, 0.15, 0.65),
    "orange": (0.95, 0.50, 0.10),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
    "gray": (0.50, 0.50, 0.50),
}
COLOUR_NAMES = tuple(COLOURS)
PALETTE = torch.tensor(list(COLOURS.values()))
SHAPE_NAMES = ("circle", "square", "triangle", "ring", "star", "koala")
KOALA = SHAPE_NAMES.index("koala")

# A koala's eyes, nose and inner ears: black on light faces, white on dark ones, to be visible in every colour.
_INK_BLACK, _INK_WHITE = torch.tensor([0.04, 0.04, 0.04]), torch.tensor([0.96, 0.96, 0.96])
_DARK_FACES = torch.tensor([name in ("black", "blue", "purple") for name in COLOUR_NAMES])


@dataclass(frozen=True)
class Drawings:
    """n drawings. colour, background, shape: int64 [n], indices into the tables above. radius, x, y: float [n],
    in half image widths from the middle."""

    colour: torch.Tensor
    background: torch.Tensor
    shape: torch.Tensor
    radius: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.colour)

    def pick(self, index: torch.Tensor) -> "Drawings":
        """The drawings at `index` (int64 [m] or bool [n])."""
        return Drawings(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def random_drawings(n: int, generator: torch.Generator) -> Drawings:
    """n drawings with shape and background of different colours, everything uniform."""
    colours = len(COLOUR_NAMES)
    colour = torch.randint(colours, (n,), generator=generator)
    other = torch.randint(1, colours, (n,), generator=generator)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    return Drawings(
        colour=colour,
        background=(colour + other) % colours,
        shape=torch.randint(len(SHAPE_NAMES), (n,), generator=generator),
        radius=uniform(0.52, 0.68),
        x=uniform(-0.18, 0.18),
        y=uniform(-0.18, 0.18),
    )


def draw(drawings: Drawings, size: int) -> torch.Tensor:
    """float32 [n, 3, size, size] in [-1, 1]."""
    picture = PALETTE[drawings.background].view(-1, 3, 1, 1).repeat(1, 1, size, size)
    for shape, chosen in _by_shape(drawings):
        part, group = picture[chosen], drawings.pick(chosen)
        paint = _paint(shape, group.colour)
        for layer, mask in _layers(shape, group, size).items():
            part = part * (1 - mask) + paint[layer] * mask
        picture[chosen] = part
    return picture * 2 - 1


def _by_shape(drawings: Drawings) -> list[tuple[int, torch.Tensor]]:
    return [(shape, drawings.shape == shape) for shape in drawings.shape.unique().tolist()]


def _layers(shape: int, drawings: Drawings, size: int) -> dict[str, torch.Tensor]:
    """The parts of a shape from back to front: the share of each pixel that each covers, [n, 1, size, size]."""
    n = len(drawings)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    # Coordinates in units of the radius, y downwards.
    radius = drawings.radius.view(n, 1, 1)
    x = ((axis.view(1, 1, size) - drawings.x.view(n, 1, 1)) / radius).expand(n, size, size)
    y = ((axis.view(1, size, 1) - drawings.y.view(n, 1, 1)) / radius).expand(n, size, size)
    distances = _koala(x, y) if shape == KOALA else {"body": _DISTANCES[SHAPE_NAMES[shape]](x, y)}
    pixels = radius * size / 2
    return {layer: (0.5 + distance * pixels).clamp(0, 1).unsqueeze(1) for layer, distance in distances.items()}


def _paint(shape: int, colour: torch.Tensor) -> dict[str, torch.Tensor]:
    """The colour of each part, [n, 3, 1, 1]."""
    face = PALETTE[colour]
    if shape != KOALA:
        paint = {"body": face}
    else:
        ink = torch.where(_DARK_FACES[colour][:, None], _INK_WHITE, _INK_BLACK)
        paint = {"ears": face, "inner ears": 0.4 * face + 0.6 * ink, "head": face, "eyes": ink, "nose": ink}
    return {layer: value.view(-1, 3, 1, 1) for layer, value in paint.items()}


def _circle(x: torch.Tensor, y: torch.Tensor, radius: float = 1.0) -> torch.Tensor:
    return radius - (x * x + y * y).sqrt()


def _square(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.85 - torch.maximum(x.abs(), y.abs())


def _triangle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y = y - 0.15  # the centroid of an equilateral triangle lies low in its bounding box
    return torch.minimum(0.55 - y, 0.55 + 0.5 * y - math.sqrt(0.75) * x.abs())


def _ring(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.2 - ((x * x + y * y).sqrt() - 0.8).abs()


def _star(x: torch.Tensor, y: torch.Tensor, inner: float = 0.45) -> torch.Tensor:
    # Fold the plane onto one tenth of the star: a half-plane bounded by the line from a tip to the next notch.
    sector = 2 * math.pi / 5
    rho, theta = (x * x + y * y).sqrt(), torch.atan2(x, -y)
    theta = (torch.remainder(theta + sector / 2, sector) - sector / 2).abs()
    tip, notch = (1.05, 0.0), (inner * math.cos(sector / 2), inner * math.sin(sector / 2))
    normal = (notch[1] - tip[1], tip[0] - notch[0])
    length = math.hypot(*normal)
    u, v = rho * torch.cos(theta), rho * torch.sin(theta)
    return -((u - tip[0]) * normal[0] + (v - tip[1]) * normal[1]) / length


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring, "star": _star}


def _ellipse(x: torch.Tensor, y: torch.Tensor, half_width: float, half_height: float) -> torch.Tensor:
    # Not the exact distance, but right to first order at the edge, which is all that anti-aliasing needs.
    u, v = x / half_width, y / half_height
    rho = (u * u + v * v).sqrt()
    slope = ((u / half_width) ** 2 + (v / half_height) ** 2).sqrt() / rho.clamp(min=1e-6)
    return (1 - rho) / slope.clamp(min=1e-6)


def _koala(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    side = x.abs()
    ear_x, ear_y = side - 0.72, y + 0.42
    return {
        "ears": _circle(ear_x, ear_y, 0.42),
        "inner ears": _circle(ear_x, ear_y, 0.23),
        "head": _ellipse(x, y - 0.12, 0.80, 0.72),
        "eyes": _circle(side - 0.36, y + 0.04, 0.12),
        "nose": _ellipse(x, y - 0.26, 0.16, 0.27),
    }


@dataclass(frozen=True)
class Caption:
    """A caption and its content; None: not mentioned. `anywhere`: the colour is that of the shape or the background."""

    text: str
    colour: int | None = None
    background: int | None = None
    shape: int | None = None
    anywhere: int | None = None


# (share of the training set, template, its content)
TEMPLATES: tuple[tuple[float, str, tuple[str, ...]], ...] = (
    (0.56, "a {colour} {shape} on a {background} background", ("colour", "shape", "background")),
    (0.07, "a {colour} {shape}", ("colour", "shape")),
    (0.06, "{colour} {shape}", ("colour", "shape")),
    (0.08, "a {shape} on a {background} background", ("shape", "background")),
    (0.07, "a {shape}", ("shape",)),
    (0.04, "{shape}", ("shape",)),
    (0.03, "a {background} background", ("background",)),
    (0.06, "{anywhere}", ("anywhere",)),
    (0.03, "", ()),
)


def all_captions() -> list[Caption]:
    """Every caption of every template, each once, in a fixed order."""
    captions = []
    for _, template, said in TEMPLATES:
        fields: list[dict[str, int]] = [{}]
        for name in said:
            count = len(SHAPE_NAMES) if name == "shape" else len(COLOUR_NAMES)
            fields = [{**field, name: value} for field in fields for value in range(count)]
        captions += [caption(template, **field) for field in fields if not _same_colour(field)]
    return captions


def _same_colour(field: dict[str, int]) -> bool:
    return "colour" in field and field["colour"] == field.get("background")


def caption(template: str, **field: int) -> Caption:
    """The caption of `template` (see TEMPLATES) with colours and shapes given by index."""
    words = {k: (SHAPE_NAMES if k == "shape" else COLOUR_NAMES)[v] for k, v in field.items()}
    return Caption(template.format(**words).replace("a orange", "an orange"), **field)


def random_captions(drawings: Drawings, generator: torch.Generator) -> list[Caption]:
    """One correct caption for each drawing, from templates sampled by their shares."""
    n = len(drawings)
    shares = torch.tensor([share for share, _, _ in TEMPLATES])
    templates = torch.multinomial(shares, n, replacement=True, generator=generator).tolist()
    coins = torch.rand(n, generator=generator).tolist()
    captions = []
    for i, (choice, coin) in enumerate(zip(templates, coins, strict=True)):
        _, template, said = TEMPLATES[choice]
        facts = {name: int(getattr(drawings, name)[i]) for name in ("colour", "background", "shape")}
        facts["anywhere"] = facts["colour" if coin < 0.5 else "background"]
        captions.append(caption(template, **{name: facts[name] for name in said}))
    return captions
