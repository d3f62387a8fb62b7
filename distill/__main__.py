"""Distils a compact U-Net out of an SDXL: python3 dev.py distill CONFIG.toml (distill/README.md)."""

from __future__ import annotations

import argparse
import sys

import diffusers
import transformers

from . import config, options, train
from .errors import UserError


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="distill", description=options.DESCRIPTION)
    options.add_options(parser)
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
