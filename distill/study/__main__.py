"""Distillation on the small models: runs what is missing, then writes docs/distillation.md and its plots.

Usage: python3 dev.py distill-study [--work DIR] [--jobs 2] [--only GROUP ...]

Several hours on two CPU cores, not counting the teacher, which needs a GPU. An interrupted study resumes with the same
command. `--jobs 0` runs nothing and writes the page from the stored figures and whatever the work folder adds.
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
