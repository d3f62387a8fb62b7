"""What is known of a loaded model: the facts that travel with a MODEL and that nodes follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .architecture.keys import parameters
from .architecture.layout import SDXL, Layout
from .architecture.lineage import KeptTransformers, Lineage, lineage
from .releases import BASE, SCHEDULER_CONFIG, SIZES, Identity, Settings
from .words import message


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a loaded model."""

    source: str
    """The file or folder, by the name that the person chose."""
    layout: Layout
    dtype: str
    """Our name of the type of most weights in the file."""
    bytes: int
    """Size of the U-Net's weights in the file."""
    identity: Identity
    """Its variant, and how that is known."""
    scheduler: Mapping[str, object]
    """diffusers' scheduler_config.json."""
    kept_transformers: KeptTransformers | None = None
    """Which of SDXL's transformer blocks it kept, where its file says so."""

    @property
    def lineage(self) -> Lineage:
        """Which SDXL layer each of its layers came from. Raises ValueError where nothing says so."""
        return lineage(self.layout, self.kept_transformers)

    @property
    def settings(self) -> Settings:
        """What its variant was published with."""
        return self.identity.variant.settings

    @property
    def side(self) -> int:
        """Side in pixels of the images that the model was trained for."""
        return SIZES.get(self.layout, self.settings.size)

    @property
    def percent_of_sdxl(self) -> float:
        """Its U-Net's parameters as a share of SDXL's, 0 to 100."""
        return 100 * parameters(self.layout) / parameters(SDXL)


def assumed_facts(layout: Layout, dtype: str, size: int) -> ModelFacts:
    """The facts of a KOALA from another loader: its layout is known by its shapes, its variant assumed.

    Args:
        layout: the U-Net's.
        dtype: our name of the type that its weights have in memory.
        size: bytes that its weights take in memory.
    """
    identity = Identity(BASE, message("Another node loaded it, which does not say."), certain=False)
    return ModelFacts(message("another loader"), layout, dtype, size, identity, SCHEDULER_CONFIG)
