"""Look at a weights file or folder, headers only, and say what it is, or exactly what is wrong with it.

Nothing here reads a tensor, and each file is opened once: what is found carries its header, and readers take that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ..architecture.component_detection import expected_text_tensors, expected_vae_tensors
from ..architecture.components import Autoencoder, TextEncoder, TextKind
from ..architecture.keys import Numbering, Shape, names
from ..architecture.layout import Layout, name
from ..architecture.lineage import KeptTransformers
from ..model_info import ModelFacts
from ..releases import SCHEDULER_CONFIG, Identity, identify, release_for
from .config import complete_scheduler, parse_json, read_json, stated_transformers, with_stated_settings
from .conventions import (
    CLIP_NETWORKS,
    CLIP_PREFIXES,
    FOLDER_PARTS,
    SCHEDULER_KEY,
    VAE_PREFIX,
    folder_label,
    folders_above,
    label,
)
from .dtypes import BY_STORED_NAME
from .folder import SCHEDULER_FILE, UNET_CONFIG_FILE, folder_files, require_part
from .header import CheckpointError, Header, Source, read_header
from .other_models import describe
from .recognise import recognise_unet, require_epsilon, require_exact, require_plain, source_of
from .recognise_parts import recognise_text_encoder, recognise_vae


@dataclass(frozen=True)
class UNetFile(Source):
    """A usable U-Net in a file."""

    layout: Layout = field(kw_only=True)
    numbering: Numbering = field(kw_only=True)
    dtype: str = field(kw_only=True)
    """Our name of the type that most weights have."""
    bytes: int = field(kw_only=True)
    """Size of all its weights."""

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata


@dataclass(frozen=True)
class Model:
    """A U-Net file together with what is known of its variant and schedule."""

    unet: UNetFile
    identity: Identity
    scheduler: Mapping[str, object] = field(default_factory=lambda: SCHEDULER_CONFIG)
    kept_transformers: KeptTransformers | None = None
    """Which of SDXL's transformer blocks it kept, where its file says so."""

    def facts(self, source: str) -> ModelFacts:
        """What is known of the model once it is loaded; ``source`` is the name that the person chose."""
        unet = self.unet
        return ModelFacts(
            source, unet.layout, unet.dtype, unet.bytes, self.identity, self.scheduler, self.kept_transformers
        )


@dataclass(frozen=True)
class TextEncoderFile(Source):
    """One of SDXL's two text encoders in a file, under the names of transformers or open_clip."""

    sizes: TextEncoder = field(kw_only=True)

    @property
    def kind(self) -> TextKind:
        """CLIP-L or CLIP-G, by its sizes."""
        return self.sizes.kind

    @property
    def tensors(self) -> dict[str, Shape]:
        """Shapes of its own tensors by their names without the prefix; the file may hold unused ones besides."""
        return expected_text_tensors(self.sizes, self.shapes)


@dataclass(frozen=True)
class VAEFile(Source):
    """An autoencoder in a file, under diffusers' or original names."""

    sizes: Autoencoder = field(kw_only=True)

    @property
    def tensors(self) -> dict[str, Shape]:
        """Shapes of its own tensors by their names without the prefix; the file may hold unused ones besides."""
        return expected_vae_tensors(self.sizes, self.shapes)


@dataclass(frozen=True)
class Checkpoint:
    """A KOALA with text encoders and VAE, in one file or in a Hugging Face folder."""

    model: Model
    text_encoder: TextEncoderFile
    text_encoder_2: TextEncoderFile
    vae: VAEFile


def inspect_unet(path: Path) -> UNetFile:
    """Recognise the KOALA U-Net in a file, bare or inside a checkpoint, in any numbering.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: with what the file is instead, or with what its U-Net lacks.
    """
    return _unet(read_header(path))


def inspect_model(path: Path) -> Model:
    """A bare U-Net file or a single-file checkpoint's U-Net, with its variant as far as the file tells it.

    Raises as ``inspect_unet``, and CheckpointError where the file's own configuration is unusable.
    """
    return _model(read_header(path))


def inspect_checkpoint(path: Path) -> Checkpoint:
    """A single-file KOALA checkpoint: U-Net, both text encoders and autoencoder.

    Raises as ``inspect_model``, and CheckpointError where one of the models beside the U-Net is absent, incomplete or
    of another width.
    """
    header = read_header(path)
    model = _model(header)
    return Checkpoint(model, *_text_and_vae(header, model.unet.layout))


def inspect_text_and_vae(path: Path, layout: Layout | None = None) -> tuple[TextEncoderFile, TextEncoderFile, VAEFile]:
    """CLIP-L, CLIP-G and VAE of any single-file checkpoint of the SDXL family, whatever its own U-Net.

    Args:
        path: the file.
        layout: of the U-Net that they are for; None for any.

    Raises FileNotFoundError, and CheckpointError where one of them is absent, incomplete or of another width.
    """
    return _text_and_vae(read_header(path), layout)


def inspect_text_encoder(path: Path) -> TextEncoderFile:
    """A CLIP-L or CLIP-G text encoder in a file of its own.

    Raises FileNotFoundError, and CheckpointError for anything else or an incomplete one.
    """
    source = Source(read_header(path))
    return TextEncoderFile(source.header, sizes=recognise_text_encoder(source))


def inspect_text_encoders(first: Path, second: Path, layout: Layout) -> tuple[TextEncoderFile, TextEncoderFile]:
    """CLIP-L and CLIP-G for a U-Net, in files of their own, given in any order.

    Raises as ``inspect_text_encoder``, and CheckpointError where they are not one of each, or do not fit the U-Net.
    """
    one, other = inspect_text_encoder(first), inspect_text_encoder(second)
    for clip_l, clip_g in ((one, other), (other, one)):
        if _text_width(clip_l, clip_g) == (layout.context, layout.pooled):
            return clip_l, clip_g
    if one.kind == other.kind:
        raise CheckpointError(
            f"{label(first)} and {label(second)} are both CLIP-{one.kind.upper()}; expected one CLIP-L and one CLIP-G. "
            f"Choose SDXL's two text encoders, in any order."
        )
    clip_l, clip_g = (one, other) if one.kind == "l" else (other, one)
    require_text_width(layout, clip_l, clip_g)
    return clip_l, clip_g


def _text_width(clip_l: TextEncoderFile, clip_g: TextEncoderFile) -> tuple[int, int | None]:
    """Width of the text that two encoders give, and of the pooled text."""
    return clip_l.sizes.hidden + clip_g.sizes.hidden, clip_g.sizes.projection


def require_text_width(layout: Layout, clip_l: TextEncoderFile, clip_g: TextEncoderFile) -> None:
    """Check that two text encoders are as wide as a U-Net asks. Raises CheckpointError where they are not."""
    width, pooled = _text_width(clip_l, clip_g)
    if (width, pooled) != (layout.context, layout.pooled):
        files = " and ".join(dict.fromkeys(label(file.path) for file in (clip_l, clip_g)))
        raise CheckpointError(
            f"{files}: the text encoders give text of width {width} and pooled {pooled}; "
            f"{name(layout)} expects {layout.context} and {layout.pooled}. Choose the text encoders that belong to the "
            f"U-Net."
        )


def inspect_vae(path: Path) -> VAEFile:
    """An autoencoder (AutoencoderKL) with SDXL's latent channels, in a file of its own.

    Raises FileNotFoundError, and CheckpointError for anything else or an incomplete one.
    """
    source = Source(read_header(path))
    return VAEFile(source.header, sizes=recognise_vae(source))


def inspect_folder(folder: Path) -> Checkpoint:
    """Recognise a KOALA folder as published on Hugging Face, fp16 or fp32, whichever transformers saved it.

    Raises CheckpointError naming what is absent and where it is published, or what does not fit.
    """
    named = folder_label(folder)
    files = folder_files(folder)
    weights = {part: require_part(files, folder, part) for part in FOLDER_PARTS}
    unet = inspect_unet(weights["unet"])
    first, second = (inspect_text_encoder(weights[part]) for part in ("text_encoder", "text_encoder_2"))
    release = release_for(unet.layout, named, folders_above(folder))
    fits = _text_width(first, second) == (unet.layout.context, unet.layout.pooled)
    if not fits and (first.kind, second.kind) != ("l", "g"):
        raise CheckpointError(
            f"{named}/text_encoder and text_encoder_2 hold CLIP-{first.kind.upper()} and "
            f"CLIP-{second.kind.upper()}; expected CLIP-L and CLIP-G. Fetch both again from {release.url()}."
        )
    require_text_width(unet.layout, first, second)
    vae = inspect_vae(weights["vae"])
    remedy = f"Restore the published file: {release.url(SCHEDULER_FILE)}"
    scheduler = complete_scheduler(read_json(files[SCHEDULER_FILE]), f"{named}/{SCHEDULER_FILE}", remedy)
    origin = read_json(files[UNET_CONFIG_FILE]).get("_name_or_path")
    run = origin if isinstance(origin, str) else ""
    identity = with_stated_settings(identify(unet.metadata, scheduler, run, named, folders_above(folder)), unet.header)
    model = Model(unet, identity, scheduler, stated_transformers(unet.header, unet.layout))
    return Checkpoint(model, first, second, vae)


def _unet(header: Header) -> UNetFile:
    prefix = header.unet_prefix
    shapes = header.under(prefix)
    layout, numbering = recognise_unet(header, shapes)
    weights = Counter[str]()  # stored type -> number of weights
    for key in shapes.keys() & names(layout, numbering):
        weights[header.dtypes[prefix + key]] += prod(shapes[key])
    file = label(header.path)
    remedy = f"Fetch {source_of(layout, header.path)}"
    require_plain(f"{file} holds {name(layout)}'s U-Net", weights, shapes, remedy)
    require_exact(header.path, layout, numbering, shapes)
    return UNetFile(
        header,
        prefix,
        layout=layout,
        numbering=numbering,
        dtype=BY_STORED_NAME[weights.most_common(1)[0][0]].name,
        bytes=sum(BY_STORED_NAME[stored].bytes * count for stored, count in weights.items()),
    )


def _model(header: Header) -> Model:
    unet, file = _unet(header), label(header.path)
    require_epsilon(header)
    place = f"{file}: the metadata {SCHEDULER_KEY}"
    remedy = f"Save the model again, or fetch {source_of(unet.layout, header.path)}"
    scheduler = complete_scheduler(parse_json(unet.metadata.get(SCHEDULER_KEY, "{}"), place), place, remedy)
    return Model(
        unet,
        with_stated_settings(identify(unet.metadata, {}, "", file, folders_above(header.path)), header),
        scheduler,
        stated_transformers(header, unet.layout),
    )


def _text_and_vae(header: Header, layout: Layout | None) -> tuple[TextEncoderFile, TextEncoderFile, VAEFile]:
    places = {"CLIP-L": CLIP_PREFIXES[0], "CLIP-G": CLIP_PREFIXES[1], "VAE": VAE_PREFIX}
    absent = [part for part, prefix in places.items() if not header.under(prefix)]
    if absent:
        raise CheckpointError(
            f"{label(header.path)} holds {describe(header.shapes)} but no {' and no '.join(absent)}; expected an SDXL "
            f"checkpoint with both text encoders and a VAE. Choose another checkpoint, or the source "
            f'"U-Net + text encoders + VAE".'
        )
    kinds: tuple[TextKind, TextKind] = ("l", "g")
    sources = [Source(header, outer + inner) for outer, inner in zip(CLIP_PREFIXES, CLIP_NETWORKS, strict=True)]
    first, second = (
        TextEncoderFile(header, source.prefix, sizes=recognise_text_encoder(source, kind, outer))
        for source, kind, outer in zip(sources, kinds, CLIP_PREFIXES, strict=True)
    )
    if layout:
        require_text_width(layout, first, second)
    vae = Source(header, VAE_PREFIX)
    return first, second, VAEFile(header, VAE_PREFIX, sizes=recognise_vae(vae))
