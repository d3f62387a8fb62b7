"""CUDA graphs, which launch all kernels of a pass at once: captured with PyTorch, their memory given back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class CudaGraphs:
    """Captures passes as CUDA graphs. Their memory is no other tensor's until they are gone."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # one for all of a GPU's: libraries hold memory for each stream

    def prepare(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See ``Recorder``. Raises what ``run`` raises."""
        current, aside = torch.cuda.current_stream(), self._aside()
        aside.wait_stream(current)
        try:
            with torch.cuda.stream(aside):
                output = run()
        finally:
            current.wait_stream(aside)
        return output.clone()  # the other's memory is the stream's own

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """See ``Recorder``. Raises torch.OutOfMemoryError where it does not fit, and RuntimeError where it cannot be
        captured."""
        current, aside = torch.cuda.current_stream(), self._aside()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()  # what earlier passes took: while capturing nothing can be given back
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls are captured: the server's may ask for free memory meanwhile.
            with (
                torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"),
                _own_workspace(),
            ):
                output = run()
        except BaseException:
            torch.cuda.set_stream(current)  # where capturing fails at its end, PyTorch does not return to it
            _end_allocating(self._pool)
            self._pool = None
            raise
        return graph.replay, output

    def release(self, forget: Callable[[], None]) -> None:
        """See ``Recorder``."""
        own = self._stream.device if self._stream is not None else None
        with torch.cuda.device(own):  # whoever asks for it may be at work on another GPU
            torch.cuda.synchronize()  # some may still be replayed
            forget()
            self._pool = None
            torch.cuda.empty_cache()
            _trim_graph_memory()

    def _aside(self) -> torch.cuda.Stream:
        if self._stream is None or self._stream.device.index != torch.cuda.current_device():
            self._stream = torch.cuda.Stream()
        return self._stream


@contextmanager
def _own_workspace() -> Iterator[None]:
    """Within a capture that is begun without cuBLAS's workspaces: it takes one of the graph's own memory. PyTorch keeps
    one for each stream, and frees it when any graph of the stream is dropped, while the others write to it."""
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _end_allocating(pool: Any) -> None:
    """Where capturing fails at its end, PyTorch goes on putting memory into the graph's pool, and then refuses to empty
    its cache and to capture again."""
    device = torch.cuda.current_device()
    with suppress(AttributeError, RuntimeError):  # an older PyTorch, or it has ended
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _trim_graph_memory() -> None:
    """CUDA's own allocator, which ComfyUI chooses on most GPUs, keeps what graphs held for later graphs; PyTorch does
    not ask for it. Without cuda-bindings, which come with newer PyTorch, it stays."""
    if torch.cuda.get_allocator_backend() != "cudaMallocAsync":
        return
    try:
        from cuda.bindings import runtime
    except ImportError:
        return
    (error,) = runtime.cudaDeviceGraphMemTrim(torch.cuda.current_device())
    if error != runtime.cudaError_t.cudaSuccess:
        logging.warning("KOALA Accelerate: memory of CUDA graphs is not given back: %s", error.name)
