"""The trainer's command line. Standard library only: its help needs no other package."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = "Distil a compact U-Net from an SDXL model."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the trainer's arguments."""
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="distill/example.toml lists every key")
    parser.add_argument(
        "--check",
        action="store_true",
        help="show the plan, the memory by part and the seconds of one trial step, and write nothing",
    )
