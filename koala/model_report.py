"""What nodes show of a loaded model, in words."""

from __future__ import annotations

from .architecture.keys import parameters
from .architecture.layout import KOALA_TINY, SDXL, name
from .model_info import ModelFacts


def badge(facts: ModelFacts) -> str:
    """The model in a few words, to be shown on a node."""
    millions = parameters(facts.layout) / 1e6
    return f"{name(facts.layout)} {facts.identity.variant.name} · {millions:,.0f}M · {_percent(facts)} of SDXL"


def report(facts: ModelFacts, memory_dtype: str, memory_bytes: int) -> str:
    """One fact a line.

    Args:
        facts: of the model.
        memory_dtype: our name of the type that its U-Net's weights have in memory.
        memory_bytes: bytes that they take.
    """
    settings = facts.settings
    sure = "" if facts.identity.certain else " (assumed)"
    return "\n".join(
        (
            f"{name(facts.layout)} from {facts.source}",
            f"U-Net: {parameters(facts.layout):,} parameters, {_percent(facts)} of SDXL's {parameters(SDXL):,}",
            f"weights: {facts.dtype}, {_megabytes(facts.bytes)}; in memory {memory_dtype}, {_megabytes(memory_bytes)}",
            f"variant: {facts.identity.variant.name}{sure}: {facts.identity.evidence}",
            f"recommended: {settings}, sampler euler, {facts.side} x {facts.side} px",
        )
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _percent(facts: ModelFacts) -> str:
    return f"{facts.percent_of_sdxl:.{1 if facts.layout == KOALA_TINY else 0}f} %"
