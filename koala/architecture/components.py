"""The models beside the U-Net, as data: sizes of text encoders and autoencoder.

``component_keys`` names their tensors, ``component_detection`` reads the sizes from a file's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .layout import HEAD_WIDTH

PROMPT_TOKENS = 77
"""Length of a tokenised prompt, begin and end included; both encoders have as many positions."""
LONG_PROMPT_TOKENS = 248
"""The same in LongCLIP."""
LATENT_SCALE = 0.13025
"""SDXL's: the U-Net's latents are the VAE's, times this."""

TextKind = Literal["l", "g"]
"""CLIP-L or CLIP-G."""


@dataclass(frozen=True)
class TextEncoder:
    """Sizes of a CLIP text encoder, all but the number of heads read from its tensors.

    SDXL's encoders have heads of 64 channels; an encoder narrower than that has one head. ``positions``: tokens of a
    section of the prompt, begin and end included. ``projection``: width of the pooled text; None without one.
    """

    hidden: int
    intermediate: int
    layers: int
    projection: int | None
    positions: int = PROMPT_TOKENS

    @property
    def heads(self) -> int:
        return max(1, self.hidden // HEAD_WIDTH)

    @property
    def kind(self) -> TextKind:
        """SDXL projects with CLIP-G alone; a CLIP-L of 12 layers may have a projection that it does not use."""
        if self.hidden in SDXL_TEXT_ENCODERS:
            return "l" if self.hidden == CLIP_L.hidden else "g"
        return "g" if self.projection and self.layers != CLIP_L.layers else "l"


CLIP_L = TextEncoder(hidden=768, intermediate=3072, layers=12, projection=None)
CLIP_G = TextEncoder(hidden=1280, intermediate=5120, layers=32, projection=1280)
SDXL_TEXT_ENCODERS = {size.hidden: size for size in (CLIP_L, CLIP_G)}


@dataclass(frozen=True)
class Autoencoder:
    """Sizes of an AutoencoderKL: channels of each stage, residual layers a stage of the encoder, latent channels."""

    channels: tuple[int, ...]
    layers: int
    latent_channels: int
    embed: int
    image_channels: int


SDXL_VAE = Autoencoder((128, 256, 512, 512), layers=2, latent_channels=4, embed=4, image_channels=3)
