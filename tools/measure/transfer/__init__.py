"""Which layers SDXL's adapters reach when they are applied to a KOALA: by stock nodes and by ours, side by side.

The tests assert these figures; ``python3 dev.py transfer`` writes them to docs/transfer.md. No real weights are needed:
adapters whose numbers are random, or say which layer they are for, show where a change lands. Importing this brings
ComfyUI into the process.
"""

from tools.harness import inprocess

inprocess.activate()

from tools.measure.transfer.attention_patches import attention_places, ip_adapter, patched_layers
from tools.measure.transfer.control_residuals import controlnet, hinted, residuals, residuals_seen
from tools.measure.transfer.lora import SQUARE_BOUND, reach, square
from tools.measure.transfer.models import (
    KOALAS,
    baked,
    clip,
    conditioning,
    difference,
    hollow,
    model,
    on_disk,
    pair,
    sample,
    sdxl_weights,
    small,
    unguarded,
    warnings_of_host,
)

__all__ = [
    "KOALAS",
    "SQUARE_BOUND",
    "attention_places",
    "baked",
    "clip",
    "conditioning",
    "controlnet",
    "difference",
    "hinted",
    "hollow",
    "ip_adapter",
    "model",
    "on_disk",
    "pair",
    "patched_layers",
    "reach",
    "residuals",
    "residuals_seen",
    "sample",
    "sdxl_weights",
    "small",
    "square",
    "unguarded",
    "warnings_of_host",
]
