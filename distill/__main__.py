"""Distils a compact U-Net from an SDXL model: koala-distill CONFIG.toml (README.md)."""

from __future__ import annotations

import argparse
import sys

from . import options
from .errors import UserError


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="koala-distill", description=options.DESCRIPTION)
    options.add_options(parser)
    arguments = parser.parse_args(argv)
    import diffusers  # seconds, which help and a mistyped argument need not wait for
    import transformers

    from . import check, config, train

    for library in (diffusers, transformers):  # the run shows one progress bar, its own
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    try:
        work = check.report if arguments.check else train.run
        work(config.read(arguments.config), lambda line: print(line, flush=True))
    except UserError as error:
        print(f"koala-distill: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
