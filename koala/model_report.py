"""What nodes show of a loaded model, in words."""

from __future__ import annotations

from .architecture.keys import parameters
from .architecture.layout import KOALA_TINY, SDXL, name
from .model_info import ModelFacts
from .words import Message, lines, message


def badge(facts: ModelFacts) -> Message:
    """The model in a few words, to be shown on a node."""
    return message(
        "{model} {variant} · {millions}M · {percent} % of SDXL",
        model=name(facts.layout),
        variant=facts.identity.variant.name,
        millions=f"{parameters(facts.layout) / 1e6:,.0f}",
        percent=_percent(facts),
    )


def report(facts: ModelFacts, memory_dtype: str, memory_bytes: int) -> Message:
    """One fact a line.

    Args:
        facts: of the model.
        memory_dtype: our name of the type that its U-Net's weights have in memory.
        memory_bytes: bytes that they take.
    """
    return lines(
        message("{model} from {source}", model=name(facts.layout), source=facts.source),
        message(
            "U-Net: {parameters} parameters, {percent} % of SDXL's {total}",
            parameters=f"{parameters(facts.layout):,}",
            percent=_percent(facts),
            total=f"{parameters(SDXL):,}",
        ),
        message(
            "weights: {dtype}, {size}; in memory {memory_dtype}, {memory}",
            dtype=facts.dtype,
            size=_megabytes(facts.bytes),
            memory_dtype=memory_dtype,
            memory=_megabytes(memory_bytes),
        ),
        message("variant: {variant}. {evidence}", variant=facts.identity.words, evidence=facts.identity.evidence),
        message(
            "recommended: {settings}, sampler euler, {side} x {side} px", settings=facts.settings.words, side=facts.side
        ),
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _percent(facts: ModelFacts) -> str:
    return f"{facts.percent_of_sdxl:.{1 if facts.layout == KOALA_TINY else 0}f}"
