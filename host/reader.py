"""Tensors from safetensors files: each read once, without a second copy of the file in memory."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from io import FileIO
from math import prod
from pathlib import Path

import comfy.memory_management
import comfy.utils
import torch

from ..koala.files.conventions import label
from ..koala.files.dtypes import STORED_DTYPES
from ..koala.files.header import CheckpointError, Source
from ..koala.files.stamp import stamp


def streamed() -> bool:
    """Whether ComfyUI streams weights from their files (dynamic VRAM); it needs its own reader's tensors, unchanged."""
    return bool(comfy.memory_management.aimdo_enabled)


def read(
    source: Source, dtype: torch.dtype | None = None, only: Container[str] | None = None
) -> dict[str, torch.Tensor]:
    """A source's tensors on the CPU, by their names without the prefix; nothing else of the file is read.

    They are read into memory, one after the other, not mapped: a model whose file is overwritten in place would change
    with it, and one whose file becomes shorter would end the process. (``--disable-mmap`` asks for the same.) Where
    ``streamed()`` the host maps the file all the same.

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
    return {name[length:]: tensor for name, tensor in tensors}


def _read_by_host(source: Source, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    weights = comfy.utils.load_torch_file(str(source.path))
    _require_unchanged(source, source.path)
    return ((name, weights[name]) for name in names)


def _read(source: Source, names: Collection[str], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors, by their full names in the order in which they lie in the file; those to be converted are read into the
    same memory."""
    header = source.header
    types = {name: STORED_DTYPES[header.dtypes[name]] for name in names}
    sizes = {name: prod(header.shapes[name]) * types[name].itemsize for name in names}
    converted = {name for name in names if dtype not in (None, types[name])}
    scratch = torch.empty(max((sizes[name] for name in converted), default=0), dtype=torch.uint8)
    with FileIO(source.path) as file:
        _require_unchanged(source, file.fileno())
        for name in names:
            memory = scratch[: sizes[name]] if name in converted else torch.empty(sizes[name], dtype=torch.uint8)
            file.seek(header.offsets[name])
            _fill(memory, file, source)
            yield name, memory.view(types[name]).view(header.shapes[name]).to(dtype)
        _require_unchanged(source, file.fileno())


def _fill(memory: torch.Tensor, file: FileIO, source: Source) -> None:
    """Read as many bytes as ``memory`` has from where the file stands. Raises CheckpointError where it ends before."""
    rest = memory.numpy().data
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
