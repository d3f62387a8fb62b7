"""How much of what a LoRA changes in SDXL's output is rounding: the change is a difference of two outputs."""

from __future__ import annotations

from torch import Tensor

ROUNDING = {"bf16": 7e-3, "fp16": 9e-4}
"""Root mean square of the rounding in the difference of two outputs, as a share of an output's; measured on sdxl-tiny,
see tests/dev/test_carry_rounding.py. Almost all of it is of activations, not of weights."""
MUCH = 0.1
"""A share of the change, from which on it is worth twice the memory to do without."""


def rounding(change: Tensor, size: Tensor, dtype: str) -> str:
    """How large a change is beside SDXL's outputs, and how much of it is rounding, in words.

    Args:
        change: of the outputs, [n, 4, h, w].
        size: root mean square of the outputs themselves.
        dtype: in which they were computed.
    """
    share = float(change.square().mean().sqrt() / size)
    said = f"SDXL's output changes by {100 * share:.2g} % (root mean square)"
    if not (noise := ROUNDING.get(dtype, 0.0) / share if share else 0.0):
        return said
    said += f"; rounding in {dtype} is about {100 * noise:.0f} % of that change, going by a small model"
    return said + ("; --dtype fp32 has next to none, and takes twice the memory for SDXL" if noise > MUCH else "")
