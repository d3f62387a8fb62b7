"""A KOALA's LoRA from what changed in an SDXL: KOALA LoRA from SDXL."""
