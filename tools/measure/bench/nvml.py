"""Memory of a process on the GPU as the driver counts it: everything, whoever allocated it, CUDA's own included.

Needs the package nvidia-ml-py, which is asked for by no requirement of this checkout: where it is missing, or the
driver does not tell (in some containers, and with Windows' display driver), figures are None and ``why_not`` says why.
"""

from __future__ import annotations

import threading
from functools import cache
from importlib import import_module
from types import TracebackType
from typing import Any

INTERVAL = 0.02
"""Seconds between two looks: the driver keeps no peak."""


@cache
def _library() -> tuple[Any, str]:
    """nvidia-ml-py, ready to be asked; or None, and why not."""
    try:
        library = import_module("pynvml")
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        return None, f"the NVIDIA driver does not answer ({error})"
    return library, ""


def process_bytes(pid: int) -> int | None:
    """What a process holds on the first GPU, in bytes; None where that is not told."""
    library, _ = _library()
    if library is None:
        return None
    try:
        device = library.nvmlDeviceGetHandleByIndex(0)
        running = [
            *library.nvmlDeviceGetComputeRunningProcesses(device),
            *library.nvmlDeviceGetGraphicsRunningProcesses(device),
        ]
    except library.NVMLError:
        return None
    return next((int(one.usedGpuMemory) for one in running if one.pid == pid and one.usedGpuMemory), None)


def why_not(pid: int) -> str:
    """Why the memory of a process that computes on the GPU is not told; empty where it is."""
    library, reason = _library()
    if library is None:
        return reason
    return "" if process_bytes(pid) is not None else "the driver does not tell it of this process"


class Watch:
    """Looks at a process again and again within a ``with`` block; ``peak`` is the most it held, None if not told."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak = process_bytes(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        if _library()[0] is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(INTERVAL):
            found = process_bytes(self.pid)
            if found is not None:
                self.peak = max(found, self.peak or 0)
