"""README.md's first picture: what koala-tiny draws, each image above its prompt.

The choice is made by a rule: of ``DRAWN`` images that are drawn for a prompt in one batch, the one that is nearest to a
drawing of what the prompt says. Prompts and seed are fixed.
"""

from __future__ import annotations

import io
from itertools import product

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional
from torchvision.transforms.functional import to_tensor

from tools.generate.captions import PROMPTS
from tools.generate.workflows import workflows
from tools.harness.client import Client
from tools.harness.contact_sheet import wrapped
from tools.harness.workflow import ObjectInfo, to_prompt, with_widget
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, Drawings, draw

GRAPH = "01 KOALA-tiny text to image"
SEED, DRAWN = 0, 8
COLUMNS, GAP, CAPTION, LETTERS = 6, 10, 34, 11  # pixels, but for the columns
SIDE = 64  # pixels at which images and drawings are compared
PLACES = (-0.24, -0.18, -0.12, -0.06, 0.0, 0.06, 0.12, 0.18, 0.24)
RADII = (0.48, 0.52, 0.56, 0.60, 0.64, 0.68, 0.72)


def contact_sheet(client: Client, info: ObjectInfo) -> Image.Image:
    """The images chosen for all prompts, in a grid."""
    chosen = [nearest(images(client, info, prompt), prompt) for prompt in PROMPTS]
    side = chosen[0].width
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (side + GAP) - GAP, rows * (side + CAPTION) + (rows - 1) * GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LETTERS)
    for number, (image, prompt) in enumerate(zip(chosen, PROMPTS, strict=True)):
        left, top = number % COLUMNS * (side + GAP), number // COLUMNS * (side + CAPTION + GAP)
        sheet.paste(image, (left, top))
        pen.multiline_text((left, top + side + 4), wrapped(prompt, font, side), fill="black", font=font)
    return sheet


def images(client: Client, info: ObjectInfo, prompt: str) -> list[Image.Image]:
    """What the shipped graph draws for a prompt."""
    workflow = workflows()[GRAPH]
    changes = (
        ("KoalaPrompt", "positive", prompt),
        ("KoalaSampler", "seed", SEED),
        ("EmptyLatentImage", "batch_size", DRAWN),
    )
    for kind, widget, value in changes:
        workflow = with_widget(workflow, info, kind, widget, value)
    found = client.run(to_prompt(workflow, info)).images()
    return [Image.open(io.BytesIO(client.view(image))).convert("RGB") for image in found]


def nearest(drawn: list[Image.Image], prompt: str) -> Image.Image:
    """The image with the least mean squared difference from any drawing of what the prompt says, wherever its shape
    lies and however large it is."""
    pictures = torch.stack([to_tensor(image) for image in drawn]) * 2 - 1
    small = functional.interpolate(pictures, size=(SIDE, SIDE), mode="area").flatten(1)
    wanted = draw(drawings(prompt), SIDE).flatten(1)
    return drawn[int(torch.cdist(small, wanted).min(dim=1).values.argmin())]


def drawings(prompt: str) -> Drawings:
    """Drawings of ``a <colour> <shape> on a <colour> background`` at all ``PLACES`` and ``RADII``."""
    words = prompt.split()
    (shape,) = (SHAPE_NAMES.index(word) for word in words if word in SHAPE_NAMES)
    colour, background = (COLOUR_NAMES.index(word) for word in words if word in COLOUR_NAMES)
    grid = torch.tensor(list(product(RADII, PLACES, PLACES)))
    whole = torch.ones(len(grid), dtype=torch.int64)
    return Drawings(whole * colour, whole * background, whole * shape, *grid.unbind(1))
