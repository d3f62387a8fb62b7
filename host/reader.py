"""Tensors from safetensors files: each read once, without a second copy of the file in memory."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
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


def read(source: Source, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A source's tensors on the CPU, by their names without the prefix; nothing else of the file is read.

    They are read into memory, one after the other, not mapped: a model whose file is overwritten in place would change
    with it, and one whose file becomes shorter would end the process. (``--disable-mmap`` asks for the same.) Where
    ``streamed()`` the host maps the file all the same.

    Args:
        source: the file's header and the prefix.
        dtype: the type to convert to; None keeps the file's. Where ``streamed()``, it is not converted.

    Raises CheckpointError where the file is not what its header was read of any more, and OSError.
    """
    length = len(source.prefix)
    tensors = _read_by_host(source) if streamed() else _read(source, dtype)
    return {name[length:]: tensor for name, tensor in tensors}


def _read_by_host(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    weights = comfy.utils.load_torch_file(str(source.path))
    _require_unchanged(source, source.path)
    return ((name, tensor) for name, tensor in weights.items() if name.startswith(source.prefix))


def _read(source: Source, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the order in which they lie in the file; of one that is converted, both types at a time."""
    header = source.header
    with FileIO(source.path) as file:
        _require_unchanged(source, file.fileno())
        for name, start in header.offsets.items():
            if name.startswith(source.prefix):
                tensor = torch.empty(header.shapes[name], dtype=STORED_DTYPES[header.dtypes[name]])
                file.seek(start)
                _read_into(tensor, file, source)
                yield name, tensor.to(dtype)
        _require_unchanged(source, file.fileno())


def _read_into(tensor: torch.Tensor, file: FileIO, source: Source) -> None:
    """Fill a tensor from where the file stands. Raises CheckpointError where the file ends before."""
    rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
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
