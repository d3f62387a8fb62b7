"""Every command of dev.py: its options, and the function that runs it.

Standard library only, so that help and mistyped options need no environment. A command's function takes the arguments
after the command's name, reads them with ``parser``, and returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import options
from tools.harness import testhost
from tools.harness.assets import SHIPPED
from tools.harness.errors import UserError

AddOptions = Callable[[argparse.ArgumentParser], object]
GENERATED = ("workflows", "blueprints", "locales", "thumbnails", "pictures", "frozen")
"""Names of the generators of tools/generate, in the order in which they run: later ones read earlier ones' files."""
SECTIONS = ("machine", "macs", "load", "step", "decode", "sample", "memory", "quality", "images", "server", "fit")
"""Sections of the benchmark, in the order in which they are measured."""
BATCH_SECTIONS = ("overhead", "scale")
"""Sections of the measurement of `dev.py batch`."""
REPORT, SEARCH = "report", "search"
"""What the benchmark can do beside measuring sections."""
GROUPS = ("curve", "place", "layers", "addons", "steps")
"""Groups of the distillation study's runs."""
MOST_STEPS, MOST_SEED = 1000, 2**64 - 1
"""What KOALA Sampler takes."""


@dataclass(frozen=True)
class Command:
    """One command of dev.py."""

    help: str
    """One line, for the list of commands and on top of the command's own help."""
    function: str
    """``module:function``, imported only when the command runs."""
    add_options: AddOptions = lambda _: None
    epilog: str = ""
    passes_on: str = ""
    """Who reads the arguments that are not the command's own; empty: such arguments are an error."""
    environment: testhost.Environment | None = None
    """What runs it, where it is another than the tests'."""


def host_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that start a server."""
    parser.add_argument(
        "--comfyui",
        type=options.comfyui,
        default=os.environ.get("COMFYUI_PATH") or None,
        metavar="DIR",
        help="your own ComfyUI, which is not changed (default: COMFYUI_PATH, else one that is fetched); it is run by "
        "the Python in its own venv, else by the one that runs this, unless COMFYUI_PYTHON names another",
    )
    parser.add_argument("--port", type=options.port, help="port of the server on this machine (default: a free one)")


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py demo``."""
    parser.add_argument("--prompt", help="what to draw; without it: a contact sheet of several prompts")
    parser.add_argument("--negative", default="", help="what to keep out of the image")
    parser.add_argument("--seed", type=options.number(0, MOST_SEED), default=0)
    steps = options.number(1, MOST_STEPS)
    parser.add_argument("--steps", type=steps, help="sampling steps (default: what the model was published with)")
    model = options.existing("a KOALA folder or .safetensors file")
    parser.add_argument("--model", type=model, help="a KOALA folder or .safetensors file (default: koala-tiny)")
    parser.add_argument("--out", type=options.image_to_write, help="PNG to write, or a folder (default: ./koala-demo/)")
    host_options(parser)


def test_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py test``."""
    parser.add_argument(
        "--all", action="store_true", help="the tests marked nightly, too: older ComfyUI releases, fresh environments"
    )


def generate_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py generate``."""
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        type=options.one_of(*GENERATED),
        help=f"{', '.join(GENERATED)} (default: all)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; name the files that are out of date, exit with 1 if any is",
    )
    parser.add_argument("--redraw", action="store_true", help="draw images again that are up to date, too")


def has_tokenizer(folder: Path) -> bool:
    """True for a folder with the two files that make CLIP's tokenizer."""
    return all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def batch_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py batch``."""
    file = options.existing("a file", Path.is_file)
    parser.add_argument(
        "workflow", metavar="WORKFLOW", type=file, help="saved for the API, or as the canvas saves it, or a PNG with it"
    )
    parser.add_argument(
        "table",
        metavar="TABLE",
        nargs="?",
        type=file,
        help=".csv, .jsonl or .parquet; a column is an input: prompt, negative, seed, ..., TITLE.INPUT or ID.INPUT",
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="COLUMN=VALUES",
        help="seed=0..9 or cfg=4,7.5: each row with each of the values; may be given several times",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="where pictures and manifest go: a folder, or s3://..., gs://..."
    )
    parser.add_argument(
        "--workers", type=options.number(1), metavar="N", help="draw on CPUs, with N workers (default: on all GPUs)"
    )
    parser.add_argument(
        "--per-gpu", type=options.number(1), default=1, metavar="N", help="workers that share a GPU (default: 1)"
    )
    parser.add_argument("--address", help="join the Ray cluster there (default: this machine alone)")
    parser.add_argument(
        "--comfyui",
        type=Path,
        default=os.environ.get("COMFYUI_PATH") or None,
        metavar="DIR",
        help="your own ComfyUI, on each machine, with its models and packs; it is not changed (default: COMFYUI_PATH, "
        "else one that is fetched and knows koala-tiny)",
    )
    parser.add_argument(
        "--inputs", type=Path, metavar="DIR", help="pictures for Load Image (default: your ComfyUI's input folder)"
    )
    parser.add_argument("--limit", type=options.number(1), metavar="N", help="draw at most N pictures now")
    parser.add_argument("--retry-errors", action="store_true", help="try rows again that had an error")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the plan and the first three graphs; draw and write nothing"
    )


def batch_bench_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py batch-bench``."""
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", type=options.one_of(*BATCH_SECTIONS), help="overhead, scale"
    )


def train_tiny_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py train-tiny``."""
    parser.add_argument(
        "--work", type=options.folder_to_write, default="koala-tiny-training", help="checkpoints and the result"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--teacher", action="store_true", help="train sdxl-tiny instead")
    which.add_argument("--grow", action="store_true", help="the same, beginning with koala-tiny's weights")
    tokenizer = options.existing("a folder with CLIP's tokenizer", has_tokenizer)
    parser.add_argument("--tokenizer", type=tokenizer, help="CLIP's (default: the fetched ComfyUI's)")


def pack_tiny_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py pack-tiny``."""
    model = options.existing("koala-tiny's diffusers folder", Path.is_dir)
    parser.add_argument(
        "--model", type=model, required=True, help="koala-tiny's diffusers folder, trained or distilled"
    )
    parser.add_argument("--out", type=options.file_to_write, default=SHIPPED)


def evaluate_tiny_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py evaluate-tiny``."""
    model = options.existing("koala-tiny's file", Path.is_file)
    parser.add_argument("--model", type=model, default=SHIPPED, help="koala-tiny's file")
    card = SHIPPED.with_suffix(".md")
    parser.add_argument("--card", type=options.file_to_write, default=card, help="images go beside it")


def lineage_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py lineage``."""
    weights = options.existing("a .safetensors file or a Hugging Face folder")
    parser.add_argument("teacher", metavar="SDXL", type=weights, help="a .safetensors file or a Hugging Face folder")
    parser.add_argument("student", metavar="KOALA", type=weights, help="likewise, cut out of that SDXL")
    parser.add_argument(
        "--out",
        type=options.file_to_write,
        metavar="FILE",
        help="write koala/architecture/lineage.py's tables here, too",
    )


def bench_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py bench``."""
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        type=options.one_of(*SECTIONS, REPORT, SEARCH),
        help=f"{', '.join(SECTIONS)}; {REPORT}: measure nothing, write the report again (default: all that tell "
        "something of the device)",
    )
    parser.add_argument(
        "--repeats", type=options.number(1), default=3, help="how often each thing is measured (default: 3)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--limit", type=options.number(1), metavar="SECONDS", help="drop, and name, what takes longer in all"
    )
    parser.add_argument(
        "--out",
        type=options.folder_to_write,
        default=testhost.ROOT / "docs",
        metavar="FOLDER",
        help="where figures are added and the page is written (default: docs/)",
    )
    parser.add_argument(
        "--comfyui",
        type=options.comfyui,
        dest="own_comfyui",
        metavar="DIR",
        help="measure this ComfyUI, by the Python that runs the benchmark (default: the one that is fetched)",
    )
    parser.add_argument(
        "--full", type=options.number(1), metavar="N", help=f"{SEARCH}: how many of 25 steps are full steps"
    )
    parser.add_argument("--sampler", default="euler", help=f"{SEARCH}: a sampler without noise (default: euler)")


def nodes_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py nodes``."""
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="show what comes of these, and write nothing")
    parser.add_argument("--rest", action="store_true", help="measure only what the newest run did not reach")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page again")


def fuzz_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py fuzz``."""
    parser.add_argument("--seed", type=options.number(0), default=7)
    parser.add_argument(
        "--cases", type=options.number(1), default=2000, metavar="N", help="how many damaged files (default: 2000)"
    )
    parser.add_argument(
        "--only", type=options.number(0), metavar="CASE", help="this case alone, whatever becomes of it"
    )
    parser.add_argument("--record", action="store_true", help="write the figures to docs/reliability.md")


def soak_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py soak``."""
    parser.add_argument("--prompts", type=options.number(1), default=500, metavar="N", help="how many (default: 500)")
    parser.add_argument("--record", action="store_true", help="write the figures to docs/reliability.md")


def options_of(module: str) -> AddOptions:
    """The options that a tool of its own declares itself."""
    return lambda parser: importlib.import_module(module).add_options(parser)


def study_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``dev.py distill-study``."""
    parser.add_argument("--work", type=options.folder_to_write, default=testhost.cache_folder() / "distillation-study")
    parser.add_argument(
        "--jobs", type=options.number(0), default=2, help="runs at the same time, one thread each; 0: only write"
    )
    group = options.one_of(*GROUPS)
    parser.add_argument("--only", nargs="*", default=[], type=group, help=f"some groups of runs: {', '.join(GROUPS)}")


COMMANDS = {
    "demo": Command("draw images with the pack in a real ComfyUI server", "tools.demo:main", demo_options),
    "serve": Command("start ComfyUI with the pack and leave it running", "tools.demo:serve_main", host_options),
    "test": Command(
        "ruff, mypy, imports, generated files, the registry's checks, then pytest",
        "tools.check.checks:main",
        test_options,
        epilog="All other arguments go to pytest, such as: dev.py test tests/unit -k lineage",
        passes_on="pytest",
    ),
    "check": Command("show packages, their imports and circles; check the layers", "tools.check.structure:main"),
    "generate": Command("write the generated files, or check them", "tools.generate.__main__:main", generate_options),
    "parity": Command("compare with diffusers and write docs/parity.md", "tools.measure.parity:main"),
    "transfer": Command(
        "measure what of SDXL's adapters reaches KOALA and write docs/transfer.md", "tools.measure.transfer.page:main"
    ),
    "lineage": Command(
        "measure which SDXL layer each KOALA layer came from", "tools.measure.lineage:main", lineage_options
    ),
    "bench": Command(
        "measure speed, memory and quality beside stock ComfyUI and diffusers",
        "tools.measure.bench.__main__:main",
        bench_options,
        f"`dev.py bench {SEARCH} --full N` looks for better tables of N full steps for KOALA Accelerate.",
    ),
    "nodes": Command(
        "run every node of ComfyUI that takes and gives a MODEL on KOALA and write docs/core-nodes.md",
        "tools.measure.nodes.page:main",
        nodes_options,
    ),
    "fuzz": Command(
        "load thousands of damaged files: each is refused by name or loaded as it is",
        "tools.fuzz.campaign:main",
        fuzz_options,
    ),
    "soak": Command(
        "send hundreds of prompts through one server and measure how its memory grows",
        "tools.measure.soak:main",
        soak_options,
    ),
    "batch": Command(
        "draw a table of prompts with a workflow, on one machine or many (batch/README.md)",
        "batch.__main__:main",
        batch_options,
        environment=testhost.BATCH,
    ),
    "batch-bench": Command(
        "measure `dev.py batch` beside a plain loop, and on simulated clusters, and write docs/batch.md",
        "tools.measure.batch:main",
        batch_bench_options,
        environment=testhost.BATCH,
    ),
    "train-tiny": Command("train the built-in model", "tools.tiny.train:main", train_tiny_options),
    "pack-tiny": Command("write the built-in model's one file", "tools.tiny.pack:main", pack_tiny_options),
    "evaluate-tiny": Command(
        "measure the built-in model and write its card", "tools.tiny.evaluate:main", evaluate_tiny_options
    ),
    "distill": Command(
        "make a compact U-Net out of an SDXL (distill/README.md)",
        "koala_sdxl.distill.__main__:main",
        options_of("koala_sdxl.distill.options"),
    ),
    "carry": Command(
        "make, from an SDXL LoRA or ControlNet, one that does on a KOALA what it does on SDXL (docs/sdxl-add-ons.md)",
        "koala_sdxl.distill.carry.__main__:main",
        options_of("koala_sdxl.distill.carry.options"),
    ),
    "distill-study": Command(
        "run the distillation study on the small models and write docs/distillation.md",
        "koala_sdxl.distill.study.__main__:main",
        study_options,
    ),
}


def top() -> argparse.ArgumentParser:
    """dev.py's own command line: one sub-parser for each command."""
    parser = options.Parser(prog="dev.py", description="Everything for developers of the KOALA node pack.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        _declare(command, commands.add_parser(name, help=command.help))
    return parser


def parser(name: str) -> argparse.ArgumentParser:
    """One command's own parser."""
    return _declare(COMMANDS[name], options.Parser(prog=f"dev.py {name}"))


def _declare(command: Command, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.description = command.help[0].upper() + command.help[1:] + "."
    parser.epilog = command.epilog
    if command.passes_on:
        parser.usage = f"%(prog)s [-h] [options] [argument of {command.passes_on} ...]"
    command.add_options(parser)
    return parser


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command with the arguments that come after its name; returns the exit status. Raises UserError."""
    from koala_sdxl.koala.files.header import CheckpointError

    module, function = COMMANDS[name].function.split(":")
    try:
        status: int | None = getattr(importlib.import_module(module), function)(list(arguments))
    except CheckpointError as error:  # what the pack says of a file is meant for the person, too
        raise UserError(str(error)) from error
    return status or 0
