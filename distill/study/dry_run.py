"""Two steps at full size on a CPU with random weights: shapes, losses, checkpoint, resume, reload, time and memory.

Usage: python -m tools.run koala_sdxl.distill.study.dry_run --work DIR [--out JSON]
(about 20 GB of memory, 30 GB of disk, 20 minutes)

SDXL in bf16 teaches a KOALA-700M in fp32 at 256 px, one image per step. The first process is killed after one step; the
second resumes from its checkpoint. The result is then loaded by the pack and by stock ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

from tools.harness import inprocess
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT
from tools.measure.bench import meter
from tools.synthetic import random_weights
from tools.tiny import dataset

from ...koala.architecture.layout import SDXL
from ...koala.files.export import unet_config
from .. import config, train

SIZE = 256
STEPS = 2


def configuration(work: Path) -> config.Config:
    """The run's configuration."""
    return config.Config.model_validate(
        {
            "output": work / "koala-700m",
            "teacher": {"model": work / "sdxl", "dtype": "bf16"},
            "data": {
                "path": work / "drawings",
                "cache": work / "cache",
                "resolution": SIZE,
                "max_aspect": 1.0,
                "workers": 0,
            },
            "training": {
                "steps": STEPS,
                "batch": 1,
                "warmup": 0,
                "ema": 0.0,  # an average would take another 3 GB
                "precision": "no",
                "gradient_checkpointing": True,
                "checkpoint_every": 1,
                "keep": 1,
            },
            "log": {"every": 1},
        }
    )


def prepare(work: Path) -> None:
    """Write the images, and SDXL as a diffusers folder: KOALA's, with another U-Net."""
    dataset.write(work / "drawings", SIZE, 4)
    inprocess.activate()
    from ... import koala_loader
    from ...host import saver as koala_saver

    folder = work / "sdxl"
    koala_saver.save_folder(folder, *koala_loader.load_folder(random_weights.folder("koala-700m")), "fp16")
    save_file(random_weights.unet_state(SDXL), folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "config.json").write_text(json.dumps(unet_config(SDXL)))


def process(work: Path, task: str, until: Path | None = None) -> tuple[float, float]:
    """Run a task in a process of its own, to its end or until a file exists, when it is killed.

    Returns its seconds and its peak memory in GB. Raises UserError where it fails."""
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "tools.run", "koala_sdxl.distill.study.dry_run", "--work", str(work), task], cwd=ROOT
    )
    killed = False
    while True:
        pid, status, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        if until and until.exists() and not killed:
            os.kill(child.pid, signal.SIGKILL)
            killed = True
        time.sleep(0.5)
    if status and not killed:
        raise UserError(f"{task} ended with status {status}; its own message is above.")
    return time.monotonic() - started, used.ru_maxrss * 1024 / 1e9


def run(work: Path) -> dict[str, object]:
    """Both processes, then both loaders; returns the figures."""
    if not (work / "sdxl").exists():
        process(work, "--prepare")
    checkpoint = work / "koala-700m" / "checkpoints" / "step-0000001"
    seconds, peaks = zip(*(process(work, "--train", until) for until in (checkpoint, None)), strict=True)
    head, *rows = ((work / "koala-700m" / "metrics.csv").read_text()).splitlines()
    file = work / "koala-700m" / "result" / "koala-700m.safetensors"
    inprocess.activate()
    import comfy.sd

    from ... import koala_loader

    ours = koala_loader.load_checkpoint(file)[0].model.diffusion_model.state_dict()
    stock = comfy.sd.load_checkpoint_guess_config(str(file), output_clip=False)[0].model.diffusion_model.state_dict()
    equal = ours.keys() == stock.keys() and all(ours[name].equal(stock[name].to(ours[name].dtype)) for name in ours)
    return {
        "metrics": [dict(zip(head.split(","), map(float, row.split(",")), strict=True)) for row in rows],
        "peak_gb": peaks,
        "seconds": seconds,
        "same_in_stock_comfyui": equal,
        "computer": meter.computer(),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dry-run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    work = arguments.work.resolve()
    if arguments.prepare:
        prepare(work)
        return 0
    if arguments.train:
        train.run(configuration(work), lambda line: print(line, flush=True))
        return 0
    found = json.dumps(run(work), indent=1)
    print(found)
    if arguments.out:
        arguments.out.write_text(found + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
