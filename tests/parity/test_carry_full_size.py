"""`dev.py carry` at full size with random weights, a few steps of each kind: it fits into memory, and makes a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from koala_sdxl.koala.architecture.layout import KOALA_700M
from koala_sdxl.koala.lora.plan import inspect_lora
from tools.harness import testhost
from tools.harness.testhost import ROOT
from tools.synthetic import random_weights

FEW = """
import sys
from koala_sdxl.distill.carry import __main__, job, run, samples
samples.SAMPLING_STEPS, job.ITERATIONS, run.ROUNDS = 4, 1, 1
sys.exit(__main__.main(sys.argv[1:]))
"""
MOST_GB = 9.0


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
def test_sdxl_and_koala_are_in_memory_one_after_the_other(tmp_path: Path) -> None:
    out, prompts = tmp_path / "lora.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("a koala\na tree\na house\na star\n")
    files = {
        "teacher": random_weights.sdxl_checkpoint(),
        "student": random_weights.folder("koala-700m"),
        "tokenizer": testhost.test_host().tokenizer,
        "prompts": prompts,
        "out": out,
    }
    words = [f"--{key}={value}" for key, value in files.items()]
    numbers = ["--size=128", "--samples=8", "--batch=2", "--steps=1", "--rank=8"]
    code = f"import tools\n{FEW}"  # the pack's name
    done = subprocess.run(
        [sys.executable, "-c", code, str(random_weights.sdxl_lora()), *words, *numbers],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = re.search(r"memory: at most ([\d.]+) GB", done.stdout)
    assert peak
    assert float(peak[1]) < MOST_GB
    plan = inspect_lora(out, KOALA_700M)
    assert plan.origin
    assert plan.origin.layout == KOALA_700M
    assert plan.count("applied") == len(plan.modules) == 222
