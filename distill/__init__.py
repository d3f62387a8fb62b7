"""A compact U-Net distilled out of an SDXL: ``python3 dev.py distill CONFIG.toml``. README.md says how."""
