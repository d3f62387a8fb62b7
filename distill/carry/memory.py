"""Memory that does not suffice, told in one line: what was being done, with which settings, and which need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import UserError
from .settings import Settings

ALLOCATORS = ("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory")
"""What is in the RuntimeErrors of PyTorch's CPU allocator, of cuBLAS and cuDNN, and of CUDA outside PyTorch's own."""


def is_shortage(error: BaseException) -> bool:
    """Whether memory did not suffice: on the CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in ALLOCATORS)


@contextmanager
def enough_memory(doing: str, given: Settings) -> Iterator[None]:
    """Raises UserError where memory does not suffice; ``doing``: what for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        size = "a smaller --size, and another --out"
        batch = "a smaller --batch, with which the run goes on, and ends with the same LoRA; or "
        raise UserError(
            f"out of memory while {doing}, at --batch {given.batch} and --size {given.size} ({said}); expected room "
            f"for the weights and for one batch. Give {batch if given.batch > 1 else ''}{size}."
        ) from None
