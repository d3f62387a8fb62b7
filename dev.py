#!/usr/bin/env python3
"""Everything that one does with a checkout, by one command each: see `python3 dev.py --help`.

Needs nothing but Python. The first run builds an environment and fetches ComfyUI, both outside the checkout
(tools/harness/testhost.py says where); each command then runs inside that environment. Help needs neither.
"""

import sys

if sys.version_info < (3, 11):  # said here, before code that an older Python cannot even read
    sys.exit(
        "dev.py: this is Python %d.%d (%s); 3.11 or newer is needed, 3.11 is the tested one. "  # noqa: UP031
        "Install it and run: python3.11 dev.py ..." % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import os
import signal
import subprocess
from pathlib import Path

from tools import commands
from tools.harness import testhost
from tools.harness.errors import UserError


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    top = commands.top()
    options, further = top.parse_known_args(arguments)
    if further and not commands.COMMANDS[options.command].passes_on:
        top.error(f"unrecognized arguments: {' '.join(further)}")
    try:
        folder = getattr(options, "comfyui", None)
        if hasattr(options, "comfyui"):
            testhost.check_program(os.environ.get("COMFYUI_PYTHON"))
        if folder and not getattr(options, "address", None):  # here the Python is still the user's own
            os.environ["COMFYUI_PYTHON"] = str(testhost.own_host(folder, os.environ.get("COMFYUI_PYTHON")).python)
        own = commands.COMMANDS[options.command].environment
        python = testhost.ensure(own or (testhost.TOOLS if folder else testhost.FULL))
        if Path(sys.prefix).resolve() != python.parent.parent.resolve():
            return run_inside(python, arguments)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server is stopped then too
        return commands.run(options.command, arguments[arguments.index(options.command) + 1 :])
    except UserError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dev.py: stopped", file=sys.stderr)
        return 130


def run_inside(python: Path, arguments: list[str]) -> int:
    """Run this file again with the environment's Python."""
    for name, value in testhost.OPENMP.items():
        os.environ.setdefault(name, value)
    command = [str(python), "-E", str(Path(__file__).resolve()), *arguments]  # -E: no PYTHONPATH of other programs
    if os.name == "posix":
        sys.stdout.flush()
        os.execv(command[0], command)
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
