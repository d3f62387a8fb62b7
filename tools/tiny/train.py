"""Trains koala-tiny from nothing: draws its pictures, then autoencoder -> text encoders -> U-Net -> diffusers folder.

Usage: python -m tools.tiny.train --tokenizer COMFYUI/comfy/sd1_tokenizer [--work DIR]

Everything is drawn from fixed seeds and every stage goes on from its last checkpoint, so a stopped run is continued by
the same command. About an hour and a half on two CPU cores.
"""

import argparse
import sys
import time
from pathlib import Path

from diffusers import UNet2DConditionModel

from tools.tiny import autoencoder, denoiser, pipeline, sheet, text
from tools.tiny.evaluate import grid_prompts, score

SEED = 0


def train(tokenizer_folder: Path, work: Path) -> Path:
    """Run every stage that `work` does not hold yet; returns the folder of the finished model."""
    done = work / "koala-tiny"
    if done.exists():
        return done
    started = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - started:7.0f} s  {line}", flush=True)

    recipe = denoiser.Recipe()
    tokenizers = text.tokenizers(tokenizer_folder)
    vae = autoencoder.train(autoencoder.Recipe(), SEED, work / "autoencoder.pt", log)
    encoders = text.train(text.Recipe(), tokenizers[0], SEED, work / "text.pt", log)
    embeddings = denoiser.embed_captions(encoders, tokenizers[0], recipe, SEED)
    small, full = (denoiser.encode_drawings(vae, recipe, size, SEED, work) for size in (recipe.small_size, recipe.size))

    def look(unet: UNet2DConditionModel, size: int) -> None:
        prompts, answers = grid_prompts(48)
        made = pipeline.pictures(pipeline.assemble(vae, encoders, tokenizers, unet), prompts, size=size)
        sheet.save(made, 12, work / f"look-{time.monotonic() - started:05.0f}.png")
        log(f"look: {score(made, answers)}")

    unet = denoiser.train(recipe, small, full, embeddings, SEED, work / "unet.pt", log, look)
    pipeline.save(pipeline.assemble(vae, encoders, tokenizers, unet), done)
    log(f"finished: {done}")
    return done


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="train-tiny", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("koala-tiny-training"), help="checkpoints and the result")
    parser.add_argument("--tokenizer", type=Path, required=True, help="CLIP's: ComfyUI's comfy/sd1_tokenizer")
    arguments = parser.parse_args(argv)
    print(train(arguments.tokenizer, arguments.work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
