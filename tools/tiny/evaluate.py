"""Measures koala-tiny's one file at KOALA's published base settings and writes its model card.

Usage: python3 dev.py evaluate-tiny [--model FILE] [--card FILE]
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from koala_sdxl.distill import sheet, single_file
from koala_sdxl.koala.files.conventions import DISTILLATION_KEY
from koala_sdxl.koala.files.header import read_header
from tools import commands
from tools.harness import testhost
from tools.tiny import autoencoder, card, pipeline
from tools.tiny.judge import UNSURE, judge, red_share
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, TEMPLATES, Drawings, caption, draw, random_drawings

PROMPTS = 216
SEED = 1000
COLOUR_FREE = tuple(f"a {shape}" for shape in SHAPE_NAMES)
COLOUR_FREE_EACH = 24


@dataclass(frozen=True)
class Score:
    """Percentages of correct images."""

    n: int
    colour: float
    background: float
    shape: float
    all: float
    shape_by_name: dict[str, float]
    colour_by_name: dict[str, float]

    def __str__(self) -> str:
        return f"colour {self.colour:.1f} background {self.background:.1f} shape {self.shape:.1f} all {self.all:.1f}"


@dataclass(frozen=True)
class Negative:
    """Red pixels of the same prompts and seeds without and with the negative prompt "red", in percent; p: one-sided
    sign-flip permutation test of the paired differences."""

    n: int
    without: float
    with_red: float
    p: float


def grid_prompts(n: int) -> tuple[list[str], Drawings]:
    """n full captions spread evenly over shapes, shape colours and backgrounds, and the drawings that they describe."""
    index = torch.arange(n)
    shape = index % len(SHAPE_NAMES)
    colour = (index // len(SHAPE_NAMES)) % len(COLOUR_NAMES)
    background = (colour + 1 + (index // (len(SHAPE_NAMES) * len(COLOUR_NAMES)) * 3 + index) % 8) % len(COLOUR_NAMES)
    middle = torch.zeros(n)
    asked = Drawings(colour, background, shape, middle + 0.6, middle, middle)
    fields = zip(colour.tolist(), background.tolist(), shape.tolist(), strict=True)
    full = TEMPLATES[0][1]
    return [caption(full, colour=c, background=b, shape=s).text for c, b, s in fields], asked


def score(pictures: torch.Tensor, asked: Drawings) -> Score:
    """Compare images, [n, 3, S, S] in [-1, 1], with the drawings that their prompts describe."""
    verdict = judge(pictures)
    colour, background, shape = (
        getattr(verdict, name) == getattr(asked, name) for name in ("colour", "background", "shape")
    )

    def percent(right: torch.Tensor) -> float:
        return 100 * float(right.float().mean())

    return Score(
        n=len(pictures),
        colour=percent(colour),
        background=percent(background),
        shape=percent(shape),
        all=percent(colour & background & shape),
        shape_by_name={name: percent(shape[asked.shape == i]) for i, name in enumerate(SHAPE_NAMES)},
        colour_by_name={name: percent(colour[asked.colour == i]) for i, name in enumerate(COLOUR_NAMES)},
    )


def judge_score(n: int = 2000, size: int = 128) -> Score:
    """The judge's own score on new drawings."""
    drawings = random_drawings(n, torch.Generator().manual_seed(SEED))
    return score(torch.cat([draw(drawings.pick(i), size) for i in torch.arange(n).split(100)]), drawings)


def negative_red(
    model: pipeline.StableDiffusionXLPipeline, each: int = COLOUR_FREE_EACH
) -> tuple[Negative, torch.Tensor, torch.Tensor]:
    """The effect of the negative prompt "red" on prompts that name no colour, `each` images of each; also the images
    without and with it."""
    prompts = list(COLOUR_FREE) * each
    plain = pipeline.pictures(model, prompts, seed=SEED)
    without_red = pipeline.pictures(model, prompts, negative="red", seed=SEED)
    before, after = red_share(plain).double(), red_share(without_red).double()
    difference = before - after
    signs = torch.randint(0, 2, (20000, len(prompts)), generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    p = (((signs * difference).mean(1) >= difference.mean()).sum() + 1) / (len(signs) + 1)
    figures = Negative(len(prompts), 100 * float(before.mean()), 100 * float(after.mean()), float(p))
    return figures, plain, without_red


def evaluate(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """All figures, and the images for the card."""
    model = single_file.pipeline(file, testhost.test_host().tokenizer)
    prompts, asked = grid_prompts(PROMPTS)
    made = pipeline.pictures(model, prompts, seed=SEED)
    fresh = draw(random_drawings(64, torch.Generator().manual_seed(SEED)), 128)
    with torch.no_grad():
        rebuilt = model.vae.decode(model.vae.encode(fresh).latent_dist.mode()).sample.clamp(-1, 1)
    error = float((rebuilt - fresh).square().mean())
    red, plain, without_red = negative_red(model)
    figures = {
        "judge": asdict(judge_score()),
        "prompts": asdict(score(made, asked)),
        "negative_red": asdict(red),
        "autoencoder_db": autoencoder.decibels(error),
        "unsure": int((judge(made).shape == UNSURE).sum()),
    }
    return figures, {"prompts": made, "plain": plain, "without_red": without_red, "fresh": fresh, "rebuilt": rebuilt}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = commands.parser("evaluate-tiny").parse_args(argv)
    metadata = read_header(arguments.model).metadata  # says what is wrong with another file
    figures, pictures = evaluate(arguments.model)
    stem = arguments.card.with_suffix("")
    sheet.save(pictures["prompts"][:72], 12, stem.with_name(stem.name + "-sheet.png"))
    pairs = torch.cat([pictures["plain"][:12], pictures["without_red"][:12]])
    sheet.save(pairs, 12, stem.with_name(stem.name + "-negative-red.png"))
    distilled = json.loads(metadata.get(DISTILLATION_KEY, "null"))
    arguments.card.write_text(card.write(figures, stem.name, distilled))
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
