"""Trains koala-tiny from scratch: generates drawings, then autoencoder -> text encoders -> U-Net -> diffusers folder.

Usage: python3 dev.py train-tiny [--work DIR] [--teacher | --grow] [--tokenizer DIR]

With --teacher it trains sdxl-tiny instead, SDXL's layout at the same width, on the same drawings, with the shipped
koala-tiny's autoencoder and text encoders: the teacher from which `dev.py distill` makes a koala-tiny. With --grow
sdxl-tiny begins with koala-tiny's weights in the layers that koala-tiny has.

All random numbers come from fixed seeds and every stage resumes from its last checkpoint, so that the same command
resumes an interrupted run. koala-tiny takes an hour and a half on two CPU cores; sdxl-tiny needs a GPU, one of its
11,000 steps takes 0.04 s on an H200; grown, it takes 700 steps of a quarter of the batch, 1.2 s each on one core.
"""

import sys
import time
from pathlib import Path

from diffusers import UNet2DConditionModel

from koala_sdxl.distill import sheet, single_file
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from tools import commands
from tools.harness import testhost
from tools.tiny import SHIPPED, autoencoder, denoiser, pipeline, text
from tools.tiny.device import DEVICE
from tools.tiny.evaluate import grid_prompts, score
from tools.tiny.grow import SDXL_TINY, grown

SEED = 0


def train(tokenizer_folder: Path, work: Path, teacher: bool, grow: bool = False) -> Path:
    """Run every stage that is not finished in `work`; returns the folder of the finished model."""
    teacher |= grow
    done = work / ("sdxl-tiny" if teacher else "koala-tiny")
    if done.exists():
        return done
    started = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - started:7.0f} s  {line}", flush=True)

    recipe, layout = (denoiser.TEACHER, SDXL_TINY) if teacher else (denoiser.Recipe(), KOALA_TINY)
    weights = None
    tokenizers = text.tokenizers(tokenizer_folder)
    if teacher:
        shipped = single_file.pipeline(SHIPPED, tokenizer_folder)
        vae, encoders = shipped.vae, text.Encoders(shipped.text_encoder, shipped.text_encoder_2)
        if grow:
            recipe, weights = denoiser.GROWN, grown(shipped.unet.state_dict(), seed=SEED)
    else:
        vae = autoencoder.train(autoencoder.Recipe(), SEED, work / "autoencoder.pt", log)
        encoders = text.train(text.Recipe(), tokenizers[0], SEED, work / "text.pt", log)
    vae, encoders = vae.to(DEVICE), encoders.to(DEVICE)
    embeddings = denoiser.embed_captions(encoders, tokenizers[0], recipe, SEED)
    small = denoiser.encode_drawings(vae, recipe, recipe.small_size, SEED, work) if recipe.small_steps else None
    full = denoiser.encode_drawings(vae, recipe, recipe.size, SEED, work) if recipe.steps else None

    def look(unet: UNet2DConditionModel, size: int) -> None:
        prompts, answers = grid_prompts(48)
        made = pipeline.pictures(pipeline.assemble(vae, encoders, tokenizers, unet), prompts, size=size)
        sheet.save(made, 12, work / f"look-{time.monotonic() - started:05.0f}.png")
        log(f"look: {score(made, answers)}")

    unet = denoiser.train(recipe, small, full, embeddings, SEED, work / "unet.pt", log, look, layout, weights)
    pipeline.save(pipeline.assemble(vae, encoders, tokenizers, unet), done)
    log(f"finished: {done}")
    return done


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = commands.parser("train-tiny").parse_args(argv)
    tokenizer = arguments.tokenizer or testhost.test_host().tokenizer
    print(train(tokenizer, arguments.work, arguments.teacher, arguments.grow))
    return 0


if __name__ == "__main__":
    sys.exit(main())
