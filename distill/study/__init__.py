"""Measures distillation on the small models and writes docs/distillation.md."""
