"""The adapters of the study: what each teaches sdxl-tiny, how it is trained, and how its effect is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, TEMPLATES, Caption, Drawings, caption, draw, random_drawings

from ....koala.releases import BASE
from ..addon_pictures import in_cyan
from ..addon_training import CONTROLNET, SHAPELESS, Recipe
from . import pictures
from .pictures import BLACK, instead_of_colour, saying

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""As in diffusers' own training script for SDXL LoRAs."""
LINEAR = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2")
FULL = TEMPLATES[0][1]


@dataclass(frozen=True)
class Use:
    """How images are drawn with an adapter."""

    steps: int = BASE.settings.steps
    cfg: float = BASE.settings.cfg
    spacing: Literal["leading", "trailing"] = "leading"


Field = tuple[int, int, int]
"""A prompt's shape, colour and background."""


@dataclass(frozen=True)
class Effect:
    """An adapter. ``drawn``: the training images; ``seen``: judges images of ``Drawings`` that their prompts describe.
    ``word``: what a caption says for it; none for a style, which every image has; ``says`` puts it there.
    ``modules``: whose weights a LoRA has factors for. ``texts``: the text encoders' attention, too.
    ``use``: in how many steps it draws; with others than usual, that is what is taught, by the teacher's usual ones.
    ``shapes``, ``backgrounds``: those with which the effect can be seen."""

    name: str
    teaches: str
    drawn: Callable[[Drawings, int], torch.Tensor]
    seen: Callable[[torch.Tensor, Drawings], torch.Tensor]
    recipe: Recipe
    kind: Literal["LoRA", "fine-tune", "ControlNet", "T2I-Adapter"] = "LoRA"
    word: str | None = None
    says: Callable[[str, Caption], str] = saying
    modules: tuple[str, ...] = ATTENTION
    texts: bool = False
    use: Use = Use()
    shapes: tuple[str, ...] = SHAPE_NAMES
    backgrounds: tuple[str, ...] = COLOUR_NAMES

    def said(self, plain: Caption) -> str:
        """A caption that names a shape and its colour, as it asks for the effect; that of what sees an outline says
        nothing of the shape."""
        if self.sees_outlines:
            assert plain.background is not None
            return caption(SHAPELESS, background=plain.background).text
        return plain.text if self.word is None else self.says(self.word, plain)

    def fields(self, held_out: bool) -> list[Field]:
        """The contents of its prompts: a third to learn from, the others to be judged."""
        shapes, backs = ([every.index(name) for name in some] for every, some in self._seen_with)
        every = [(s, c, b) for b in backs for s in shapes for c in range(len(COLOUR_NAMES)) if c != b]
        return [field for field in every if ((field[0] + field[2]) % 3 != 0) == held_out]

    @property
    def sees_outlines(self) -> bool:
        """Whether it has an image to follow beside the prompt."""
        return self.kind in ("ControlNet", "T2I-Adapter")

    @property
    def _seen_with(self) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        return (SHAPE_NAMES, self.shapes), (COLOUR_NAMES, self.backgrounds)


def plain(field: Field) -> Caption:
    """The caption of a prompt's contents."""
    shape, colour, background = field
    return caption(FULL, shape=shape, colour=colour, background=background)


def asked(fields: list[Field]) -> Drawings:
    """The drawings that prompts describe, somewhere and of some size."""
    shape, colour, background = torch.tensor(fields).T
    anywhere = random_drawings(len(fields), torch.Generator().manual_seed(0))
    return replace(anywhere, colour=colour, background=background, shape=shape)


CYAN = Effect(
    "cyan",
    "a word for one more colour, cyan",
    in_cyan,
    pictures.is_cyan,
    Recipe(steps=600, drawings=800, learning_rate=5e-3),
    word="cyan",
    says=instead_of_colour,
    shapes=tuple(name for name in SHAPE_NAMES if name != "koala"),  # SDXL's autoencoder draws it too dark to tell
)
STRIPED = Effect(
    "striped",
    "a word for stripes across a shape",
    pictures.striped,
    pictures.is_striped,
    Recipe(steps=500, drawings=800, learning_rate=4e-3, rank=8),
    word="striped",
    modules=LINEAR,
    shapes=("circle", "square", "triangle", "koala"),  # not of thin parts
)
OUTLINED = Effect(
    "outlined",
    "a style for every image: only outlines",
    pictures.outlined,
    pictures.is_outlined,
    Recipe(steps=500, drawings=800, learning_rate=4e-3, rank=8),
    modules=LINEAR,
    shapes=("circle", "square", "triangle", "star", "koala"),
)
TINY = Effect(
    "tiny",
    "a word for a size, with the text encoders",
    pictures.tiny,
    pictures.is_tiny,
    Recipe(steps=500, drawings=800, learning_rate=5e-3),
    word="tiny",
    texts=True,
    shapes=("circle", "square", "triangle"),  # that SDXL's autoencoder can draw so small
)
FRAMED = Effect(
    "framed",
    "a word for a black frame, with the convolutions (LoCon)",
    pictures.framed,
    pictures.is_framed,
    Recipe(steps=800, drawings=800, learning_rate=4e-3, rank=8),
    word="framed",
    modules=(*LINEAR, *CONVOLUTIONS),
    backgrounds=tuple(name for name in COLOUR_NAMES if name != COLOUR_NAMES[BLACK]),
)
TUNED = Effect(
    "fine-tune",
    "a fine-tuned U-Net: only outlines in every image",
    pictures.outlined,
    pictures.is_outlined,
    Recipe(steps=300, drawings=400, learning_rate=4e-4),
    kind="fine-tune",
    shapes=OUTLINED.shapes,
)
FAST = Effect(
    "fast",
    "to draw in 8 steps without guidance (an acceleration LoRA): what is counted is the image that is asked for",
    draw,
    pictures.is_right,
    Recipe(steps=80, drawings=400, learning_rate=3e-3, batch=8, rank=8),
    modules=LINEAR,
    use=Use(8, 1.0, "trailing"),
)
CONTROLLED = Effect(
    "controlnet",
    "to follow an outline, of which the prompt says nothing (a ControlNet)",
    draw,
    pictures.follows,
    CONTROLNET,
    kind="ControlNet",
)
SKETCHED = replace(
    CONTROLLED,
    name="t2i-adapter",
    teaches="the same (a T2I-Adapter, by lineage alone: `dev.py carry` takes none)",
    kind="T2I-Adapter",
)
EFFECTS = (CYAN, STRIPED, OUTLINED, TINY, FRAMED, FAST, TUNED, CONTROLLED, SKETCHED)
PLAIN = Effect("plain", "nothing", draw, pictures.is_right, CYAN.recipe)
"""What prompts without the word are to show."""
