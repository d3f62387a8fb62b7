"""Trains a compact U-Net to do what SDXL's does, by distillation. README.md says how to install and run it."""
