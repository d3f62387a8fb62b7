"""koala-tiny's drawings as files: a folder of PNG images with a caption beside each, as `dev.py distill` reads them.

Usage: python -m tools.tiny.dataset --out DIR [--size 128] [--count 3500]
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

from koala_sdxl.koala.files.atomic_write import written_whole
from tools.tiny.checkpoints import step_generator
from tools.tiny.denoiser import Recipe
from tools.tiny.pictures import KOALA, draw, random_captions, random_drawings

STAGE = 4
SEED = 0


def write(folder: Path, size: int, count: int) -> None:
    """Write `count` images of `size` pixels, with as many more koalas as in koala-tiny's own training; an existing
    folder is not changed. Captions are koala-tiny's, without the empty one."""
    if folder.exists():
        return
    generator = step_generator(SEED, STAGE, size)
    drawings = random_drawings(2 * count, generator)
    odds = 1 + (Recipe().koalas - 1) * (drawings.shape == KOALA).float()
    drawings = drawings.pick(torch.multinomial(odds, 2 * count, replacement=True, generator=generator))
    captions = random_captions(drawings, generator)
    with_text = [index for index, caption in enumerate(captions) if caption.text][:count]
    drawings, captions = drawings.pick(torch.tensor(with_text)), [captions[index] for index in with_text]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as aside:
        aside.mkdir()
        for part in torch.arange(count).split(256):
            levels = ((draw(drawings.pick(part), size) + 1) * 127.5).round().clamp(0, 255).byte()
            for index, pixels in zip(part.tolist(), levels.permute(0, 2, 3, 1), strict=True):
                Image.fromarray(pixels.numpy()).save(aside / f"{index:05d}.png")
                (aside / f"{index:05d}.txt").write_text(captions[index].text + "\n", "utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dataset", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=Recipe().size, help="side of the images in pixels")
    parser.add_argument("--count", type=int, default=Recipe().drawings)
    arguments = parser.parse_args(argv)
    write(arguments.out, arguments.size, arguments.count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
