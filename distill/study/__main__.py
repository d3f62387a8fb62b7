"""Distillation tried out on the small family: runs what the study lacks, writes docs/distillation.md and its plots.

Usage: python3 dev.py distill-study [--work DIR] [--jobs 2] [--only GROUP ...]

Several hours on two CPU cores, without the teacher, which is for a GPU. Stopped at any time, it goes on with the same
command.
"""

import sys

from tools import commands
from tools.harness.errors import UserError

from .. import errors
from . import page, runs


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = commands.parser("distill-study").parse_args(argv)
    work = arguments.work.resolve()
    try:
        if arguments.jobs:
            runs.run_all(work, arguments.jobs, arguments.only)
        print(page.write(work))
    except (UserError, errors.UserError) as problem:
        print(f"distill-study: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
