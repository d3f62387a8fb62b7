"""Safetensors files as plain data, so that a mutation can write what no library would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

STORED: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""The format's name of a type -> PyTorch's."""
STORED_NAMES = {dtype: name for name, dtype in STORED.items()}
WEIGHTS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types that hold plain weights; numbers of any other type are codes or counts."""


@dataclass
class Tensor:
    """One tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: torch.Tensor) -> Tensor:
        """A tensor's own bytes."""
        raw = values.detach().contiguous().reshape(-1).view(torch.uint8) if values.numel() else torch.empty(0)
        return cls(STORED_NAMES[values.dtype], tuple(values.shape), bytes(raw.numpy().tobytes()))

    def values(self) -> torch.Tensor:
        """As PyTorch's tensor. Raises RuntimeError where the bytes do not fill the shape."""
        if not self.data:
            return torch.empty(self.shape, dtype=STORED[self.dtype])
        return torch.frombuffer(bytearray(self.data), dtype=STORED[self.dtype]).reshape(self.shape)


@dataclass
class Weights:
    """A safetensors file before it is written."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Weights:
        """A state dict's tensors."""
        return cls({name: Tensor.of(values) for name, values in state.items()}, dict(metadata or {}))

    def copy(self) -> Weights:
        """Another one, to be changed; tensors are replaced, never written to."""
        return Weights(dict(self.tensors), dict(self.metadata))

    def table(self) -> dict[str, Any]:
        """The header's table, with offsets in the order of the tensors."""
        table: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        end = 0
        for name, tensor in self.tensors.items():
            start, end = end, end + len(tensor.data)
            table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        return table

    def data(self) -> bytes:
        """All that follows the header."""
        return b"".join(tensor.data for tensor in self.tensors.values())

    def content(self) -> bytes:
        """The whole file."""
        return pack(json.dumps(self.table(), separators=(",", ":")).encode(), self.data())


def pack(header: bytes, data: bytes) -> bytes:
    """A file of a header's text, padded to 8 bytes as the library writes it, and the data."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def element(dtype: str) -> int:
    """Bytes of one number."""
    return STORED[dtype].itemsize


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return prod(shape) * element(dtype)
