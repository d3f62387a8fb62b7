"""koala-tiny, the built-in model: its pictures, its training, its judge, its packing."""

from tools.harness.assets import CONTROLNET, LORA, SHIPPED

__all__ = ["CONTROLNET", "LORA", "SHIPPED"]
