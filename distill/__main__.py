"""Distils a compact U-Net out of an SDXL: python3 dev.py distill CONFIG.toml (distill/README.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import diffusers
import transformers

from tools.harness.errors import UserError

from . import config, train


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dev.py distill", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="distill/example.toml has every key")
    arguments = parser.parse_args(argv)
    for library in (diffusers, transformers):  # the run has one progress bar, its own
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    try:
        train.run(config.read(arguments.config), lambda line: print(line, flush=True))
    except UserError as problem:
        print(f"distill: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
