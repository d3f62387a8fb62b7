"""Full-size models one at a time: a machine of 10 GB has room for no more."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock

from tools import testhost


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
