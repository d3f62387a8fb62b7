"""Time and memory of this process, in seconds and bytes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch

from tools.measure.bench import nvml

T = TypeVar("T")
STATUS = Path("/proc/self/status")
UNITS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
"""Vector units that make processors of one name differ in speed, by the kernel's names for them."""


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """How long it took, and what it gave. On a GPU, work is over when its queue is empty."""
    _wait()
    start = time.perf_counter()
    made = work()
    _wait()
    return time.perf_counter() - start, made


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak() -> dict[str, int]:
    """Begin a new peak, and return the memory in use now: ``ram`` (resident, mapped files included) and ``gpu``.

    The latter is what PyTorch holds of the GPU: what the graphs that it has captured will use counts as free to it.
    """
    with suppress(OSError):  # not every kernel has it: the peak is then that of the process
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return {"ram": _kilobytes("VmRSS"), "gpu": torch.cuda.memory_reserved() if torch.cuda.is_available() else 0}


def peak() -> dict[str, int]:
    """The most since ``forget_peak``, or since the process began."""
    return {"ram": _kilobytes("VmHWM"), "gpu": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0}


def _kilobytes(name: str) -> int:
    told = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(told.get(name, told["VmRSS"]).split()[0]) * 1024  # likewise VmHWM


def _nvml(device: str) -> str:
    """Why the driver does not tell the memory of a process on the GPU; empty where it does, or there is no GPU."""
    if device != "cuda":
        return ""
    held = torch.zeros(1, device=device)
    return nvml.why_not(os.getpid()) if held.numel() else ""


def measured(work: Callable[[], torch.Tensor], out: str, times: int = 1) -> dict[str, Any]:
    """Seconds for one of ``times``, those that processors spent on it, and peak; what was made is written to the file
    ``out`` as an array, if there is one."""
    if out and torch.cuda.is_available():
        torch.cuda.empty_cache()  # of other sizes: the first of a size is compared
    forget_peak()
    before = time.process_time()
    with nvml.Watch(os.getpid()) as watch:
        seconds, made = timed(work)
    processor = time.process_time() - before
    if out:
        numpy.save(out, made.float().cpu().numpy())
    return {"seconds": seconds / times, "processor": processor / times, "peak": {**peak(), "nvml": watch.peak}}


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on and with."""
    import diffusers
    from comfyui_version import __version__ as comfyui

    return {
        **computer(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "nvml": _nvml(device),
        "versions": {
            "ComfyUI": comfyui,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__.split("+")[0],
            "Python": platform.python_version(),
        },
    }


def computer() -> dict[str, Any]:
    """The processor's name and vector units, how many cores of it there are, the memory in bytes, the GPU's name if
    there is one."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    flags = next((line.split(":")[1].split() for line in info if line.startswith("flags")), [])
    units = ", ".join(name for flag, name in UNITS.items() if flag in flags)
    return {"cpu": cpu, "units": units, "cores": os.cpu_count(), "memory": int(memory.split()[1]) * 1024, "gpu": gpu}
