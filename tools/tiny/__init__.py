"""koala-tiny, the built-in model: its pictures, its training, its judge, its packing."""

from tools.harness.testhost import ROOT

SHIPPED = ROOT / "assets" / "koala-tiny.safetensors"
"""The built-in model's file in this checkout."""
LORA = SHIPPED.with_name("koala-tiny-cyan.safetensors")
CONTROLNET = SHIPPED.with_name("koala-tiny-outline.safetensors")
"""What was trained on its teacher, sdxl-tiny, for it to carry."""
