#!/usr/bin/env python3
"""Everything that one does with a checkout, by one command each: see `python3 dev.py --help`.

Needs nothing but Python. The first run builds an environment and fetches ComfyUI, both outside the checkout
(tools/testhost.py says where); each command then runs inside that environment.
"""

import sys

if sys.version_info < (3, 11):  # said here, before code that an older Python cannot even read
    sys.exit(
        "dev.py: this is Python %d.%d (%s); 3.11 or newer is needed, 3.11 is the tested one. "  # noqa: UP031
        "Install it and run: python3.11 dev.py ..." % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import argparse
import os
import runpy
import signal
import subprocess
from pathlib import Path

from tools import testhost
from tools.problem import Problem

MODULES = {
    "train-tiny": "tools.tiny.train",
    "pack-tiny": "tools.tiny.pack",
    "evaluate-tiny": "tools.tiny.evaluate",
    "parity": "tools.parity",
    "transfer": "tools.transfer",
    "lineage": "tools.lineage",
    "bench": "tools.bench",
    "distill": "tools.distill",
    "distill-study": "tools.study",
}
PASS_ON = ("test", *MODULES)  # their further arguments go to what they run


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="dev.py", description="Demo, tests and training for the KOALA node pack.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make pictures with the pack in a real ComfyUI server")
    demo.add_argument("--prompt", help="what to draw; without it: a contact sheet of several prompts")
    demo.add_argument("--negative", default="", help="what to keep out of the picture")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, help="sampling steps (default: what the model was published with)")
    demo.add_argument("--model", help="a KOALA folder or .safetensors file (default: the built-in koala-tiny)")
    demo.add_argument("--out", type=Path, help="PNG to write, or a folder (default: ./koala-demo/)")
    add_host(demo)

    add_host(commands.add_parser("serve", help="start ComfyUI with the pack and leave it running; prints the URL"))
    test = commands.add_parser(
        "test", help="ruff, mypy, the registry's checks, then pytest; further arguments go to pytest"
    )
    test.add_argument(
        "--all", action="store_true", help="older ComfyUI releases, Manager and fresh environments, too: as CI at night"
    )
    commands.add_parser("train-tiny", help="train the built-in model; further arguments go to tools.tiny.train")
    commands.add_parser(
        "pack-tiny", help="write the built-in model's one file; further arguments go to tools.tiny.pack"
    )
    commands.add_parser("evaluate-tiny", help="measure the built-in model and write its card, likewise")
    commands.add_parser("parity", help="compare with diffusers and write docs/parity.md")
    commands.add_parser("transfer", help="measure what of SDXL's adapters reaches KOALA and write docs/transfer.md")
    commands.add_parser("lineage", help="SDXL KOALA [--out FILE]: measure which SDXL layer each KOALA layer came from")
    commands.add_parser("bench", help="measure speed, memory and quality beside stock ComfyUI and diffusers, likewise")
    commands.add_parser("distill", help="CONFIG.toml: make a compact U-Net out of an SDXL (tools/distill/README.md)")
    commands.add_parser("distill-study", help="try distillation out on the small family, write docs/distillation.md")
    return top


def add_host(command: argparse.ArgumentParser) -> None:
    """Options of the commands that start a server."""
    command.add_argument(
        "--comfyui",
        type=Path,
        default=os.environ.get("COMFYUI_PATH") or None,
        metavar="DIR",
        help="a ComfyUI that you have, left as it is (default: COMFYUI_PATH, else one that is fetched); run by the "
        "Python in its own venv, else by the one that runs this, unless COMFYUI_PYTHON names another",
    )
    command.add_argument("--port", type=int, help="port of the server on this machine (default: a free one)")


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    top = parser()
    options, further = top.parse_known_args(arguments)
    if further and options.command not in PASS_ON:
        top.error(f"unrecognized arguments: {' '.join(further)}")
    try:
        host = None
        if folder := getattr(options, "comfyui", None):
            host = testhost.own_host(folder, os.environ.get("COMFYUI_PYTHON"))
            os.environ["COMFYUI_PYTHON"] = str(host.python)  # found here, where the Python is still the person's own
        python = testhost.ensure(testhost.TOOLS if host else testhost.FULL)
        if Path(sys.prefix).resolve() != python.parent.parent.resolve():
            return run_inside(python, arguments)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server is stopped then too
        return run(options, further, host or testhost.test_host())
    except Problem as problem:
        print(f"dev.py: {problem}", file=sys.stderr)
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


def run(options: argparse.Namespace, further: list[str], host: testhost.Host) -> int:
    """Run a command, inside the environment."""
    if options.command == "test":
        from tools import checks

        return checks.run(further, options.all)
    if options.command in MODULES:
        tokenizer = str(host.tokenizer)
        own = ["--tokenizer", tokenizer] if options.command == "train-tiny" else []
        sys.argv = [options.command, *own, *further]
        runpy.run_module(MODULES[options.command], run_name="__main__", alter_sys=True)
        return 0

    from tools import demo

    if options.command == "serve":
        return demo.serve(host, options.port)
    return demo.run(
        host,
        demo.Request(options.prompt, options.negative, options.seed, options.steps, options.model, options.out),
        options.port,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
