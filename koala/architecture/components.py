"""The models beside the U-Net, as data: sizes of text encoders and autoencoder.

``component_keys`` names their tensors, ``component_detection`` reads the sizes from a file's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .layout import HEAD_WIDTH, NORM_GROUPS

PROMPT_TOKENS = 77
"""Length of a tokenised prompt, begin and end included; both encoders have as many positions."""
LONG_PROMPT_TOKENS = 248
"""The same in LongCLIP."""
LATENT_CHANNELS = 4
VAE_STAGES = 4
LATENT_SCALE = 0.13025
"""SDXL's: the U-Net's latents are the VAE's, times this."""

LEAST_TEXT_LAYERS = 3
"""SDXL takes the last layer but one; ComfyUI wants one more before it (sd1_clip.py, ``layer_idx``)."""
TEXT_LAYER_MODULES = (
    *(f"self_attn.{projection}_proj" for projection in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
)
"""What a text encoder's layer consists of, transformers' names."""

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
    def fault(self) -> str:
        """What makes these sizes those of no network; empty where nothing does."""
        if self.hidden > HEAD_WIDTH and self.hidden % HEAD_WIDTH:
            return f"has the width {self.hidden}; expected a multiple of {HEAD_WIDTH}, the width of an attention head"
        if self.layers < LEAST_TEXT_LAYERS:
            return f"has {self.layers} layers; expected {LEAST_TEXT_LAYERS} or more, as ComfyUI builds it"
        return ""

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

    @property
    def fault(self) -> str:
        """What makes these sizes those of no autoencoder for SDXL's latents; empty where nothing does."""
        if self.latent_channels != LATENT_CHANNELS:
            return f"has {self.latent_channels} latent channels; expected SDXL's with {LATENT_CHANNELS}"
        if len(self.channels) != VAE_STAGES:
            return f"has {len(self.channels)} stages; expected SDXL's with {VAE_STAGES}, which scale by 8"
        first = self.channels[0]
        if odd := [width for width in self.channels if not width or width % first or width % NORM_GROUPS]:
            return f"has a stage of {odd[0]} channels; expected multiples of {NORM_GROUPS} and of its first stage's"
        return ""


SDXL_VAE = Autoencoder((128, 256, 512, 512), layers=2, latent_channels=4, embed=4, image_channels=3)
