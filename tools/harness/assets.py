"""The pack's own weights in this checkout, below assets/."""

from __future__ import annotations

from tools.harness.testhost import ROOT

SHIPPED = ROOT / "assets" / "koala-tiny.safetensors"
"""The built-in model, koala-tiny."""
LORA = SHIPPED.with_name("koala-tiny-cyan.safetensors")
CONTROLNET = SHIPPED.with_name("koala-tiny-outline.safetensors")
"""Trained on koala-tiny's teacher, sdxl-tiny."""
