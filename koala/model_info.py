"""What is known of a loaded model: the facts that travel with a MODEL and that nodes follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .architecture.keys import parameters
from .architecture.layout import SDXL, Layout
from .architecture.lineage import Kept, Lineage, lineage
from .files.inspect import Model
from .releases import BASE, SCHEDULER_CONFIG, SIZES, Identity, Settings


@dataclass(frozen=True)
class ModelFacts:
    """A loaded model: where from, which layout, weights in which type and of how many bytes, variant and schedule."""

    source: str
    layout: Layout
    dtype: str
    bytes: int
    identity: Identity
    scheduler: Mapping[str, object]
    kept: Kept | None = None
    """Which of SDXL's transformer blocks it kept, where its file says so."""

    @property
    def lineage(self) -> Lineage:
        """Which SDXL layer each of its layers came from. Raises ValueError where nothing says so."""
        return lineage(self.layout, self.kept)

    @property
    def settings(self) -> Settings:
        return self.identity.variant.settings

    @property
    def side(self) -> int:
        """Side in pixels of the pictures that the model was made for."""
        return SIZES.get(self.layout, self.settings.size)

    @property
    def percent_of_sdxl(self) -> float:
        return 100 * parameters(self.layout) / parameters(SDXL)


def facts_of(model: Model, source: str) -> ModelFacts:
    """The facts that an inspected file tells; ``source`` is the name that the person chose."""
    unet = model.unet
    return ModelFacts(source, unet.layout, unet.dtype, unet.bytes, model.identity, model.scheduler, model.kept)


def assumed_facts(layout: Layout, dtype: str, size: int) -> ModelFacts:
    """The facts of a KOALA that another loader built: its layout is seen, its variant only assumed."""
    identity = Identity(BASE, "loaded by another node, which does not say; base is assumed", certain=False)
    return ModelFacts("another loader", layout, dtype, size, identity, SCHEDULER_CONFIG)
