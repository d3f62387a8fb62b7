"""Which ComfyUI is measured: the tested one, or one's own, by the Python that runs the benchmark."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tools.harness import testhost
from tools.harness.testhost import Host

VARIABLE = "KOALA_BENCH_COMFYUI"
"""The environment variable that tells workers of one's own ComfyUI."""


def use(folder: Path) -> None:
    """Have this process, and workers that it starts, measure the ComfyUI in a folder. Raises UserError if there is
    none."""
    os.environ[VARIABLE] = str(testhost.own_host(folder, sys.executable).folder)


def measured(tested: Callable[[], Host] = testhost.test_host) -> Host:
    """The ComfyUI that is measured; ``tested`` gives the tested one, which is built if need be. Raises UserError."""
    own = os.environ.get(VARIABLE)
    return testhost.own_host(Path(own), sys.executable) if own else tested()
