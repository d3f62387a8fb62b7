"""Distillation tried out on the small family: what docs/distillation.md is made of."""
