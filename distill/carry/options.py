"""The command line. Standard library only: its help needs no other package."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = "Make, from an SDXL LoRA or ControlNet, one that does on a KOALA what the first does on SDXL."
METHODS = ("fit", "refit")
DTYPES = ("bf16", "fp16", "fp32")
SPACINGS = ("leading", "trailing")
MOST_STEPS = 1000
"""Of the noise schedule."""


def at_least(least: int, multiple: int = 1, most: float = math.inf) -> Callable[[str], int]:
    """A whole number of ``least`` or more, and of ``most`` or less, that is a multiple of another."""

    def read(text: str) -> int:
        if text.isdecimal() and least <= int(text) <= most and int(text) % multiple == 0:
            return int(text)
        kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
        limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{text}: expected {kind}, {limits}")

    return read


def guidance(text: str) -> float:
    """A guidance scale: a number of 1 or more."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if 1 <= found < math.inf:
        return found
    raise argparse.ArgumentTypeError(f"{text}: expected a number, 1 (no guidance) or more")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; each is a field of ``settings.Settings``, which has the defaults."""
    add = parser.add_argument
    add(
        "lora",
        type=Path,
        metavar="LORA",
        help="an SDXL LoRA, .safetensors, of any kind that KOALA LoRA Loader reads; a fine-tuned SDXL; or a ControlNet",
    )
    add("--teacher", type=Path, required=True, metavar="SDXL", help="a Hugging Face folder or a .safetensors file")
    add("--student", type=Path, required=True, metavar="KOALA", help="likewise, the KOALA that the LoRA is for")
    add("--prompts", type=Path, required=True, metavar="FILE", help="a text file, one prompt a line, that use the LoRA")
    add("--keep", type=Path, metavar="FILE", help="likewise, prompts whose images the LoRA is to leave as they are")
    add("--hints", type=Path, metavar="FOLDER", help="for a ControlNet: control images (PNG, JPEG, WebP)")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the new LoRA or ControlNet, a .safetensors file that is not there yet",
    )
    add("--method", choices=METHODS, help="fit: least squares; refit: further training after that (default)")
    add(
        "--rank",
        type=at_least(1),
        metavar="N",
        help="of the new LoRA (default: twice that of LORA, at least 16)",
    )
    add("--size", type=at_least(64, 8), metavar="PIXELS", help="side of the images that are sampled (default: 1024)")
    add(
        "--draw-steps",
        type=at_least(1, most=MOST_STEPS),
        metavar="N",
        help="in which images are drawn with LORA (default: 25)",
    )
    add("--cfg", type=guidance, metavar="X", help="likewise, their guidance scale; 1 is none (default: 7.5)")
    add("--spacing", choices=SPACINGS, help="likewise, where the steps lie in the noise schedule (default: leading)")
    add("--samples", type=at_least(8), metavar="N", help="noisy latents to learn from (default: 1024)")
    add("--steps", type=at_least(1), metavar="N", help="optimiser steps of refit, of 8 samples each (default: 300)")
    add("--batch", type=at_least(1), metavar="N", help="samples in one forward pass: what memory allows (default: 8)")
    add("--seed", type=at_least(0), metavar="N", help="of all random numbers (default: 0)")
    add("--dtype", choices=DTYPES, help="in which SDXL computes (default: fp16); the KOALA computes in fp32")
    add("--tokenizer", type=Path, metavar="DIR", help="folder with CLIP's tokenizer, where SDXL is a single file")
    add("--check", action="store_true", help="read the files' headers, show the plan and the memory, and do nothing")
