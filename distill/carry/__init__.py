"""From an SDXL LoRA, a LoRA for a KOALA that does on it what the first does on SDXL: `dev.py carry`, `koala-carry`."""
