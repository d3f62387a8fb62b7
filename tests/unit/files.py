"""Weights files for tests: a true safetensors header over data that is only a hole, so that 10 GB cost nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

from koala_sdxl.koala.architecture.keys import Numbering, Shape, tensors
from koala_sdxl.koala.architecture.layout import Layout

BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8},
    **{"I64": 64, "I32": 32, "I8": 8, "U8": 8, "BOOL": 8},
}
"""Type's name in a header -> bits of one number."""


def header(
    shapes: Mapping[str, Shape], dtype: str | Mapping[str, str] = "F16", metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a safetensors file, its length in front, padded to 8 bytes as the library writes it.

    ``dtype`` is one type, or a type for every name.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        kind = dtype if isinstance(dtype, str) else dtype[name]
        start, end = end, end + prod(shape) * BITS[kind] // 8
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    path: Path,
    shapes: Mapping[str, Shape],
    dtype: str | Mapping[str, str] = "F16",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A safetensors file with these tensors, every weight 0, on disk as a hole. Makes its folder, too."""
    start = header(shapes, dtype, metadata)
    kinds = {name: dtype if isinstance(dtype, str) else dtype[name] for name in shapes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start)
    os.truncate(path, len(start) + sum(prod(shape) * BITS[kinds[name]] // 8 for name, shape in shapes.items()))
    return path


def unet(layout: Layout, numbering: Numbering = "diffusers", prefix: str = "") -> dict[str, Shape]:
    """Names and shapes of a layout's U-Net."""
    return {prefix + getattr(tensor, numbering): tensor.shape for tensor in tensors(layout)}
