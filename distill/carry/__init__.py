"""From an SDXL LoRA or ControlNet, one for a KOALA that does on it what the first does on SDXL: `dev.py carry`."""
