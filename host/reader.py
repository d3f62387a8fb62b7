"""Tensors from safetensors files: each read once, without a second copy of the file in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import comfy.memory_management
import comfy.utils
import torch
from safetensors import safe_open

from ..koala.files.header import Source

GROUP = 32_000_000
"""Number of weights that are converted from one mapping of a file before it is released."""


def streamed() -> bool:
    """Whether ComfyUI streams weights from their files (dynamic VRAM); it needs its own reader's tensors, unchanged."""
    return bool(comfy.memory_management.aimdo_enabled)


def read(source: Source, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A source's tensors on the CPU, by their names without the prefix; nothing else of the file is read.

    A tensor that has the wanted type in the file is not copied: it is the file, mapped. The mapping is private (a write
    to it would not reach the file), takes memory when it is first used, and gives it up where memory is short.
    Replacing the file, as downloads do, does not change what is mapped; overwriting it in place does, which is why
    ``--disable-mmap`` is followed.

    Args:
        source: the file's header and the prefix.
        dtype: the type to convert to; None keeps the file's. Where ``streamed()``, it is not converted.
    """
    length = len(source.prefix)
    if streamed():
        return {name[length:]: tensor for name, tensor in _read_by_host(source)}
    tensors = _read_by_host(source) if comfy.utils.DISABLE_MMAP else _read_in_groups(source)
    return {name[length:]: tensor.to(dtype) for name, tensor in tensors}


def _read_by_host(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    weights = comfy.utils.load_torch_file(str(source.path))
    return ((name, tensor) for name, tensor in weights.items() if name.startswith(source.prefix))


def _read_in_groups(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the file's order, a few at a time from one mapping: what was read of a mapping stays in memory until
    the last of its tensors is released."""
    groups: list[list[str]] = [[]]
    weights = 0
    for name, shape in source.header.shapes.items():
        if name.startswith(source.prefix):
            if weights >= GROUP:
                groups.append([])
                weights = 0
            groups[-1].append(name)
            weights += prod(shape)
    for group in groups:
        with safe_open(source.path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in group)
