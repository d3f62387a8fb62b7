"""Fewer and cheaper passes through KOALA's U-Net."""
