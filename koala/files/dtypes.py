"""Data types of weights: one table, from which every other list of types is derived."""

from __future__ import annotations

from typing import NamedTuple

import torch


class WeightDtype(NamedTuple):
    """One data type: our name of it (also the node's choice), its name in a safetensors header, PyTorch's object."""

    name: str
    stored: str
    torch_dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of one weight."""
        return self.torch_dtype.itemsize


WEIGHT_DTYPES = (
    WeightDtype("fp32", "F32", torch.float32),
    WeightDtype("fp16", "F16", torch.float16),
    WeightDtype("bf16", "BF16", torch.bfloat16),
    WeightDtype("fp8_e4m3fn", "F8_E4M3", torch.float8_e4m3fn),
    WeightDtype("fp8_e5m2", "F8_E5M2", torch.float8_e5m2),
)
"""Types that a U-Net's weights may have in a file."""

BY_STORED_NAME = {dtype.stored: dtype for dtype in WEIGHT_DTYPES}
STORED_DTYPES: dict[str, torch.dtype] = {
    **{dtype.stored: dtype.torch_dtype for dtype in WEIGHT_DTYPES},
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in a safetensors header -> PyTorch's type, of all that a file may hold beside weights, too."""
TORCH_DTYPES = {dtype.name: dtype.torch_dtype for dtype in WEIGHT_DTYPES}
"""Our name -> PyTorch's type."""


def dtype_name(dtype: torch.dtype) -> str:
    """Our name of a PyTorch type; for a type outside the table, PyTorch's own name, such as "int8"."""
    named = (known.name for known in WEIGHT_DTYPES if known.torch_dtype == dtype)
    return next(named, str(dtype).removeprefix("torch."))
