"""The published settings of every released KOALA, and how a model's variant is told.

Sources: the model cards and README of etri-vilab's KOALA repositories (25 steps at guidance 7.5 with the shipped
leading Euler schedule for the base models; 10 steps at 3.5, trailing, for Lightning) and their scheduler_config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, KOALA_TINY, Layout
from .words import Message, message

Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

PUBLISHER = "https://huggingface.co/etri-vilab"

SCHEDULER_CONFIG: Mapping[str, object] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
"""SDXL's scheduler_config.json, which every KOALA repository ships; used where a file brings none of its own."""


@dataclass(frozen=True)
class Settings:
    """What a model was published with: steps, guidance scale, timestep spacing, image side in pixels."""

    steps: int
    cfg: float
    spacing: Spacing
    size: int = 1024

    @property
    def words(self) -> Message:
        """For a person."""
        return message(
            "{steps} steps, cfg {cfg}, {spacing}", steps=self.steps, cfg=f"{self.cfg:g}", spacing=self.spacing
        )

    def __str__(self) -> str:
        return str(self.words)


@dataclass(frozen=True)
class Variant:
    """A family of weights that share one layout but not their settings."""

    name: Literal["base", "lightning"]
    settings: Settings


STOCK_SCHEDULERS: dict[Spacing, str] = {"leading": "ddim_uniform", "trailing": "simple"}
"""ComfyUI's own scheduler that comes nearest to a spacing; the same sigmas for step counts that divide 1000."""

BASE = Variant("base", Settings(25, 7.5, "leading"))
LIGHTNING = Variant("lightning", Settings(10, 3.5, "trailing"))
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (BASE, LIGHTNING)}
VARIANT_KEY = "koala.variant"
"""Metadata of a file that names its variant: a key of ``VARIANTS``."""


@dataclass(frozen=True)
class Release:
    """A published repository: its name, layout and variant."""

    name: str
    layout: Layout
    variant: Variant

    def url(self, file: str = "") -> str:
        """The repository's page, or the download address of one of its files."""
        return f"{PUBLISHER}/{self.name}" + (f"/resolve/main/{file}" if file else "")


RELEASES = (
    Release("koala-700m", KOALA_700M, BASE),
    Release("koala-700m-llava-cap", KOALA_700M, BASE),
    Release("koala-1b", KOALA_1B, BASE),
    Release("koala-1b-llava-cap", KOALA_1B, BASE),
    Release("koala-lightning-700m", KOALA_700M, LIGHTNING),
    Release("koala-lightning-1b", KOALA_1B, LIGHTNING),
    Release("koala-lightning-1.7b", KOALA_1_7B, LIGHTNING),
)

SIZES: dict[Layout, int] = {KOALA_TINY: 128}
"""Image side in pixels of the models that were not made for 1024."""


def release_for(layout: Layout, file_name: str = "", folders: Iterable[str] = ()) -> Release:
    """The release that a file most likely is, else the first one with its layout, else KOALA-700M.

    Args:
        layout: its U-Net's.
        file_name: its name, with folders or without.
        folders: names of the folders above, the nearest first.
    """
    for part in (*_parts(file_name), *folders):
        if named := [release for release in RELEASES if release.name in part.lower()]:
            return max(named, key=lambda release: len(release.name))
    return next((release for release in RELEASES if release.layout == layout), RELEASES[0])


def _parts(file_name: str) -> list[str]:
    """The parts of a name that may have folders, the nearest first."""
    return file_name.replace("\\", "/").split("/")[::-1]


@dataclass(frozen=True)
class Identity:
    """A model's variant, and the evidence for it in a sentence; ``certain`` is False where it is only assumed."""

    variant: Variant
    evidence: str
    certain: bool = True

    @property
    def words(self) -> str:
        """The variant, for a person."""
        name = self.variant.name
        return name if self.certain else message("{variant} (assumed)", variant=name)


def identify(
    metadata: Mapping[str, str],
    scheduler: Mapping[str, object],
    origin: str,
    file_name: str,
    folders: Iterable[str] = (),
) -> Identity:
    """Tell base from Lightning weights, which have the same shapes.

    Looked at in this order: the safetensors metadata ``koala.variant``; a trailing schedule in scheduler_config.json
    (the published Lightning files say leading, so leading proves nothing); ``origin``, the training run named in
    unet/config.json; the file's or folder's name; the folders above it, as Hugging Face's cache has the repository's
    name there. Nothing found: base is assumed, and ``certain`` is False.

    Args:
        metadata: of the U-Net's file.
        scheduler: contents of scheduler_config.json.
        origin: ``_name_or_path`` of unet/config.json.
        file_name: the file's or folder's name, with folders or without.
        folders: names of the folders above, the nearest first; of these, only those count that name a KOALA.
    """
    if (stated := metadata.get(VARIANT_KEY)) in VARIANTS:
        return Identity(
            VARIANTS[stated], message('Its metadata says so: {key} is "{value}".', key=VARIANT_KEY, value=stated)
        )
    if scheduler.get("timestep_spacing") == "trailing":
        return Identity(LIGHTNING, message("Its scheduler_config.json asks for trailing timesteps."))
    if "lightning" in origin.lower():
        return Identity(LIGHTNING, message("Its unet/config.json names a Lightning training run."))
    own = _parts(file_name)
    for part in (*own, *folders):
        named = part.lower()
        if "lightning" in named and (part in own or "koala" in named):
            return Identity(LIGHTNING, message('The name "{name}" says so.', name=part))
        if any(release.name in named for release in RELEASES):
            return Identity(BASE, message('The name "{name}" says so.', name=part))
    return Identity(BASE, message("Nothing in the file tells base from Lightning."), certain=False)
