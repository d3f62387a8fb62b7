"""The settings of KOALA Accelerate that are measured: its presets, and their means one by one."""

from __future__ import annotations

from koala_sdxl.host.accelerate import plan
from koala_sdxl.host.accelerate.plan import BF16, EXACT, Acceleration

PRESETS = tuple(plan.PRESETS)
BF16_ALONE = "bf16 alone"
REUSE_ALONE = ("balanced, fp32", "fast, fp32")
"""A preset's reuse of features without bf16: the same on every processor but for rounding."""
VARIANTS: dict[str, Acceleration] = {
    **plan.PRESETS,
    BF16_ALONE: Acceleration(BF16),
    **{name: Acceleration(EXACT, plan.REUSE[name.split(",")[0]]) for name in REUSE_ALONE},
}
SAME_ROUTINES = {
    "balanced, fp32": "exact",
    "fast, fp32": "exact",
    "balanced": BF16_ALONE,
    "fast": BF16_ALONE,
}
"""What each of these differs from in its reuse alone."""
ROUTINES = {"pack, exact": EXACT, "pack, bf16": BF16}
"""KOALA Accelerate's routines on the CPU, which take turns with the engines in the pack's own process."""
VAE_IN_BF16 = "bf16 in the VAE"
"""The name of the probe for it, in a machine's figures."""
