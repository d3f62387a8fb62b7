"""The command line of `dev.py generate`: writes the generated files, or says which are out of date."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tools import commands
from tools.generate import blueprints, frozen, locales, pictures, thumbnails, workflows
from tools.generate.generator import Generator
from tools.harness.testhost import say

GENERATORS: dict[str, Generator] = {
    "workflows": workflows.GENERATOR,
    "blueprints": blueprints.GENERATOR,
    "locales": locales.GENERATOR,
    "thumbnails": thumbnails.GENERATOR,
    "pictures": pictures.GENERATOR,
    "frozen": frozen.GENERATOR,
}
"""By the names of ``commands.GENERATED``, in that order."""


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    options = commands.parser("generate").parse_args(arguments)
    names = [name for name in GENERATORS if name in options.what] or list(GENERATORS)
    if options.check:
        return check(names)
    for name in names:
        say(f"== {name}")
        GENERATORS[name].write(options.redraw)
    return 0


def check(names: Sequence[str]) -> int:
    """Say which files are out of date and what brings them up to date; returns 1 if any is."""
    failed = False
    for name in names:
        for fault in GENERATORS[name].check():
            failed = True
            say(f"{fault} [python3 dev.py generate {name}]")
    return int(failed)


def check_without_server() -> int:
    """The part of the check that takes a few seconds."""
    return check([name for name, generator in GENERATORS.items() if not generator.needs_server])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
