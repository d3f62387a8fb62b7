"""Full-size models, or as much in several processes, one at a time: a machine of 10 GB has room for no more.

And what else memory has a say in.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from filelock import FileLock

from tools.harness import testhost


@contextmanager
def alone() -> Iterator[None]:
    """A full-size model may be in memory: no other process of any test run has one meanwhile, and none stays."""
    with FileLock(testhost.cache_folder() / "full-size.lock", is_singleton=True):
        try:
            yield
        finally:
            let_go()


def let_go() -> None:
    """Give back what this process holds and nobody needs any more."""
    if management := sys.modules.get("comfy.model_management"):
        management.unload_all_models()
        gc.collect()
        management.cleanup_models()
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def enough_memory() -> Iterator[None]:
    """A fixture's body: ComfyUI in this process finds memory free, however little there is.

    By what is free it takes a batch, or prompt and negative prompt, in one pass or in several, and these differ in the
    last bits.
    """
    from comfy import model_management

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_management, "get_free_memory", _free_memory)
        yield


def _free_memory(device: object = None, torch_free_too: bool = False) -> int | tuple[int, int]:
    free = 16 * 10**9
    return (free, free) if torch_free_too else free
