"""Tensors from safetensors files: each read once, without a second copy of the file in memory."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import comfy.memory_management
import comfy.utils
import torch

from ..koala.files.conventions import label
from ..koala.files.dtypes import STORED_DTYPES
from ..koala.files.header import CheckpointError, Source
from ..koala.files.stamp import stamp

THREADS = 4
"""Reading KOALA-700M's U-Net, measured on two cores: from disk 1.4 s instead of 4.1 (eight threads are no faster), from
the system's memory 0.75 of one thread's time."""
PIECE = 4 << 20
"""Bytes."""


def streamed() -> bool:
    """Whether ComfyUI streams weights from their files (dynamic VRAM); it needs its own reader's tensors, unchanged."""
    return bool(comfy.memory_management.aimdo_enabled)


def read(
    source: Source, dtype: torch.dtype | None = None, only: Container[str] | None = None
) -> dict[str, torch.Tensor]:
    """A source's tensors on the CPU, by their names without the prefix; nothing else of the file is read.

    They are read into memory, not mapped: a model whose file is overwritten in place would change with it, and one
    whose file becomes shorter would end the process. (``--disable-mmap`` asks for the same.) Where ``streamed()`` the
    host maps the file all the same.

    Args:
        source: the file's header and the prefix.
        dtype: the type to convert to; None keeps the file's. Where ``streamed()``, it is not converted.
        only: the tensors to read, by their names without the prefix; None for all.

    Raises CheckpointError where the file is not what its header was read of any more, and OSError.
    """
    length = len(source.prefix)
    names = [
        name
        for name in source.header.offsets
        if name.startswith(source.prefix) and (only is None or name[length:] in only)
    ]
    tensors = _read_by_host(source, names) if streamed() else _read(source, names, dtype)
    return {name[length:]: tensors[name] for name in names}


def _read_by_host(source: Source, names: Iterable[str]) -> dict[str, torch.Tensor]:
    weights = comfy.utils.load_torch_file(str(source.path))
    _require_unchanged(source, source.path)
    return {name: weights[name] for name in names}


def _read(source: Source, names: Iterable[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Tensors by their full names. A disk answers several requests sooner than one after the other, and new memory is
    made by several threads at once: each takes the next tensor of the file."""
    inference, rest = torch.is_inference_mode_enabled(), iter(names)

    def some(thread: int) -> dict[str, torch.Tensor]:
        with torch.inference_mode(inference):  # a thread does not take it over
            return dict(_tensors(source, rest, dtype))

    with ThreadPoolExecutor(THREADS) as threads:
        return {name: tensor for part in threads.map(some, range(THREADS)) for name, tensor in part.items()}


def _tensors(source: Source, names: Iterable[str], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors, one after the other; those to be converted are read in pieces that stay in the processor's cache."""
    header = source.header
    scratch = torch.empty(PIECE, dtype=torch.uint8)
    with FileIO(source.path) as file:
        _require_unchanged(source, file.fileno())
        for name in names:
            stored = STORED_DTYPES[header.dtypes[name]]
            tensor = torch.empty(header.shapes[name], dtype=dtype or stored)
            file.seek(header.offsets[name])
            if tensor.dtype == stored:
                _fill(tensor, file, source)
            else:
                for part in tensor.view(-1).split(PIECE // stored.itemsize):
                    piece = scratch.view(stored)[: len(part)]
                    _fill(piece, file, source)
                    part.copy_(piece)
            yield name, tensor
        _require_unchanged(source, file.fileno())


def _fill(tensor: torch.Tensor, file: FileIO, source: Source) -> None:
    """Read a contiguous tensor from where the file stands. Raises CheckpointError where it ends before."""
    rest = tensor.view(-1).view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)  # at most 2 GB at a time
        if not count:
            raise _changed(source)
        rest = rest[count:]


def _require_unchanged(source: Source, file: Path | int) -> None:
    if stamp(file) != source.header.stamp:
        raise _changed(source)


def _changed(source: Source) -> CheckpointError:
    return CheckpointError(
        f"{label(source.path)} was changed while it was being loaded, or since; expected the file that was inspected. "
        f"Let the download or copy finish, then run again."
    )
