"""Tensors out of safetensors files: each read once, and no second copy of a file in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import comfy.memory_management
import comfy.utils
import torch
from safetensors import safe_open

from ..koala.files.header import Source

GROUP = 32_000_000
"""Weights (a count) that are converted from one mapping of a file before it is let go."""


def streamed() -> bool:
    """Whether the host streams weights from their files (dynamic VRAM): it needs tensors of its own reader, as read."""
    return bool(comfy.memory_management.aimdo_enabled)


def read(source: Source, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A part's tensors in ``dtype`` (None: the file's) on the CPU, by their names without the prefix; nothing else of
    the file is read.

    A tensor that has this type in the file is not copied: it is the file, mapped. The mapping is private (a write to it
    would not reach the file), takes memory when it is first used, and gives it up where memory is short. A file that is
    replaced, as downloads do it, leaves the mapped one be; one that is overwritten in place does not, so that
    ``--disable-mmap`` is heeded. Where ``streamed()``, the tensors are as in the file.
    """
    length = len(source.prefix)
    if streamed():
        return {name[length:]: tensor for name, tensor in _by_the_host(source)}
    tensors = _by_the_host(source) if comfy.utils.DISABLE_MMAP else _by_groups(source)
    return {name[length:]: tensor.to(dtype) for name, tensor in tensors}


def _by_the_host(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    weights = comfy.utils.load_torch_file(str(source.path))
    return ((name, tensor) for name, tensor in weights.items() if name.startswith(source.prefix))


def _by_groups(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the file's order, of few at a time from one mapping: what was read of a mapping stays in memory until
    the last of its tensors is gone."""
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
