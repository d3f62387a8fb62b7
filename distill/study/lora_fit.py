"""Does a LoRA that `dev.py carry` makes show more on a koala-tiny than one carried over by lineage? Makes and counts.

Usage: python -m tools.run koala_sdxl.distill.study.lora_fit --teacher DIR --student FILE --lora FILE --work DIR
                                   [--size PIXELS] [--seeds N] [--out JSON]

The LoRA is the one for cyan that addons.py trains. None of the prompts that it is carried over with is judged. The new
LoRAs are ordinary files for KOALA, in the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from tools.measure.bench import meter
from tools.tiny import pipeline
from tools.tiny.grow import SDXL_TINY
from tools.tiny.judge import judge
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, TEMPLATES, caption

from ...koala.architecture.layout import KOALA_TINY, Layout
from ...koala.lora.fit import Changes
from ...koala.lora.plan import inspect_lora
from ...koala.lora.weights import load
from .. import single_file
from ..carry import run
from ..carry.changes import changed_weights
from ..carry.options import METHODS
from ..carry.settings import Settings
from ..carry.write import CARRY_KEY
from .addon_pictures import judge_cyan, saying_cyan

PROMPTS = 24  # that the LoRA is carried over with, and a third as many without its word
BATCH = 32
STRENGTHS = (1.0, 1.5, 2.0, 3.0)

Field = tuple[int, int, int]
"""A prompt's shape, colour and background."""


@dataclass(frozen=True)
class Row:
    """Percentages of images: of n prompts with the LoRA's word those with a cyan shape, the correct background, the
    correct shape, and all three; of n_plain prompts without it those with the prompt's shape and colours."""

    row: str
    seed: int
    n: int
    n_plain: int
    cyan: float
    background: float
    shape: float
    all: float
    plain: float


def fields(held_out: bool) -> list[Field]:
    """The prompts' contents: a third for fitting, the others to be judged."""
    shapes, colours = range(len(SHAPE_NAMES)), range(len(COLOUR_NAMES))
    every = [(shape, colour, back) for back in colours for shape in shapes for colour in colours if colour != back]
    return [field for field in every if ((field[0] + field[2]) % 3 != 0) == held_out]


def said(field: Field, cyan: bool) -> str:
    """The prompt of a field."""
    shape, colour, background = field
    plain = caption(TEMPLATES[0][1], shape=shape, colour=colour, background=background).text
    return saying_cyan(plain, colour) if cyan else plain


def some(held_out: bool, n: int, generator: torch.Generator) -> list[Field]:
    """n different fields."""
    every = fields(held_out)
    return [every[index] for index in torch.randperm(len(every), generator=generator)[:n].tolist()]


def changes_of(path: Path, layout: Layout, unet: UNet2DConditionModel) -> Changes:
    """What a LoRA file adds to a U-Net's weights: name of a weight -> change."""
    loaded, own = load(inspect_lora(path, layout)), unet.get_parameter
    return {name: new - own(name) for name, new in changed_weights(loaded.unet, layout, own)}


@contextmanager
def changed(unet: UNet2DConditionModel, changes: Mapping[str, Tensor]) -> Iterator[UNet2DConditionModel]:
    """A U-Net with changes added to its weights, which are as before afterwards."""
    before = {name: unet.get_parameter(name).detach().clone() for name in changes}
    with torch.no_grad():
        for name, change in changes.items():
            unet.get_parameter(name).add_(change)
    try:
        yield unet
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                unet.get_parameter(name).copy_(weight)


def carried(teacher: Path, student: Path, lora: Path, work: Path, size: int, seed: int, method: str) -> Path:
    """The LoRA that the tool makes, made if it is not there; it learns from prompts that are not judged."""
    generator = torch.Generator().manual_seed(seed)
    path = work / f"{lora.stem}-{method}-{seed}.safetensors"
    words = {"prompts": some(False, PROMPTS, generator), "keep": some(False, PROMPTS // 3, generator)}
    files = {name: work / f"{name}-{seed}.txt" for name in words}
    for name, contents in words.items():
        lines = [said(field, cyan=name == "prompts") for field in contents]
        files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not path.exists():
        given: dict[str, Any] = {**files, "size": size, "seed": seed, "method": method, "batch": BATCH, "dtype": "fp32"}
        run.run(
            Settings(lora=lora, teacher=teacher, student=student, out=path, **given),
            lambda line: print(line, flush=True),
        )
    return path


def judged(name: str, model: StableDiffusionXLPipeline, size: int, seed: int, n: int = 96, n_plain: int = 54) -> Row:
    """Sample and judge held-out prompts with and without the LoRA's word."""
    generator = torch.Generator().manual_seed(seed)
    asked, plain = some(True, n, generator), some(True, n_plain, generator)
    made = judge_cyan(
        pipeline.pictures(model, [said(field, True) for field in asked], seed=10**5 * (seed + 1), size=size)
    )
    shape, _, background = torch.tensor(asked).T
    right, same = made.shape == shape, made.background == background
    others = judge(
        pipeline.pictures(model, [said(field, False) for field in plain], seed=10**5 * (seed + 2), size=size)
    )
    shape, colour, background = torch.tensor(plain).T
    kept = (others.shape == shape) & (others.colour == colour) & (others.background == background)
    shares = (_percent(values) for values in (made.cyan, same, right, made.cyan & same & right, kept))
    return Row(name, seed, n, n_plain, *shares)


def _percent(values: Tensor) -> float:
    return 100 * float(values.float().mean())


def evaluate(teacher: Path, student: Path, lora: Path, work: Path, size: int, seeds: int) -> dict[str, Any]:
    """Carry the LoRA over and judge, once for each seed; returns the figures for JSON."""
    model = pipeline.load(teacher)
    whole, part = model.unet, single_file.pipeline(student, teacher / "tokenizer").unet
    for unet in (whole, part):
        unet.requires_grad_(False)
    changes, by_lineage = changes_of(lora, SDXL_TINY, whole), changes_of(lora, KOALA_TINY, part)
    work.mkdir(parents=True, exist_ok=True)
    rows, made = [], []
    for seed in range(seeds):
        paths = {method: carried(teacher, student, lora, work, size, seed, method) for method in METHODS}
        for path in paths.values():
            with safe_open(path, framework="pt") as file:
                made.append(json.loads(file.metadata()[CARRY_KEY]))
        nets: dict[str, tuple[UNet2DConditionModel, Changes]] = {
            "teacher + LoRA": (whole, changes),
            "student": (part, {}),
            **{
                f"student + LoRA, lineage, strength {k}": (part, {n: k * c for n, c in by_lineage.items()})
                for k in STRENGTHS
            },
            **{f"student + LoRA, {way}": (part, changes_of(path, KOALA_TINY, part)) for way, path in paths.items()},
        }
        for name, (unet, its) in nets.items():
            with torch.no_grad(), changed(unet, its) as model.unet:
                rows.append(judged(name, model, size, seed))
            print(rows[-1], flush=True)
    return {"carried": made, "rows": [asdict(row) for row in rows], "computer": meter.computer()}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lora-fit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="sdxl-tiny's diffusers folder")
    parser.add_argument("--student", type=Path, required=True, help="a koala-tiny's checkpoint file")
    parser.add_argument("--lora", type=Path, required=True, help="a LoRA for cyan, trained on the teacher")
    parser.add_argument("--work", type=Path, required=True, help="folder of the new LoRAs")
    parser.add_argument("--size", type=int, choices=(64, 128), default=128, help="side of the images in pixels")
    parser.add_argument("--seeds", type=int, default=3, help="how many times prompts and noise are drawn")
    parser.add_argument("--out", type=Path, help="JSON file for the figures, which are printed as well")
    given = parser.parse_args(argv)
    found = evaluate(given.teacher, given.student, given.lora, given.work, given.size, given.seeds)
    figures = json.dumps(found, indent=2)
    print(figures)
    if given.out:
        given.out.write_text(figures + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
