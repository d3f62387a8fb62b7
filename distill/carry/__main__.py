"""Carries an SDXL LoRA or ControlNet over to a KOALA: koala-carry LORA --teacher SDXL --student KOALA ..."""

from __future__ import annotations

import argparse
import sys

from . import options


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="koala-carry", description=options.DESCRIPTION)
    options.add_options(parser)
    arguments = parser.parse_args(argv)
    import diffusers  # seconds, which help and a mistyped argument need not wait for
    import transformers

    from ...koala.files.atomic_write import SaveError
    from ...koala.files.header import CheckpointError
    from ..errors import UserError
    from . import run
    from .settings import settings

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    try:
        run.run(settings(arguments), lambda line: print(line, flush=True))
    except (UserError, CheckpointError, SaveError) as error:
        print(f"koala-carry: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
