"""`dev.py carry` once at full size, with random weights, on a CPU: memory, and seconds a pass.

Usage: python -m tools.run koala_sdxl.distill.study.carry_dry_run --work DIR [--size PIXELS]
(about 16 GB of memory, 20 GB of disk, half an hour)

An SDXL LoRA is carried over to KOALA-700M: few samples of small images, as the passes are many. The figures
go to runs/carry_dry_run.json in the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

from tools.measure.bench import meter
from tools.synthetic import adapters, random_weights

from ...koala.architecture.layout import SDXL
from ...koala.files.atomic_write import replace_file
from ..carry import run
from ..carry.settings import Settings
from . import dry_run

PROMPTS = ("a koala", "a tree", "a river", "a house")


def carried(work: Path, size: int) -> list[str]:
    """Carry the LoRA over; what the tool says."""
    if not (work / "sdxl").exists():
        dry_run.process(work, "--prepare")
    lora, prompts = work / "lora.safetensors", work / "prompts.txt"
    save_file(adapters.lora(SDXL, only=adapters.in_attention), lora)
    replace_file(prompts, "\n".join(PROMPTS) + "\n")
    said: list[str] = []

    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
        said.append(line)

    run.run(
        Settings(
            lora=lora,
            teacher=work / "sdxl",
            student=random_weights.folder("koala-700m"),
            prompts=prompts,
            out=work / "new.safetensors",
            size=size,
            draw_steps=2,
            samples=8,
            dtype="bf16",  # a CPU may have no fast fp16
            steps=2,
        ),
        say,
    )
    return said


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="carry-dry-run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    given = parser.parse_args(argv)
    work = given.work.resolve()
    found = {"size": given.size, "said": carried(work, given.size), "computer": meter.computer()}
    (work / "runs").mkdir(parents=True, exist_ok=True)
    replace_file(work / "runs" / "carry_dry_run.json", json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
