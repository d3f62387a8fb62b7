"""Every kind of adapter file that is tried, by library."""

from __future__ import annotations

from importlib.metadata import version

from tools.measure.transfer.libraries import by_diffusers, by_lycoris, by_peft
from tools.measure.transfer.libraries.sdxl import Kind

KINDS: tuple[Kind, ...] = (*by_peft.KINDS, *by_lycoris.KINDS, *by_diffusers.KINDS, *by_peft.OTHERS)
LIBRARIES = ("peft", "lycoris-lora", "diffusers", "transformers")
"""Packages whose versions decide what the files look like."""


def versions() -> dict[str, str]:
    """The versions that are installed."""
    return {name: version(name) for name in LIBRARIES}
