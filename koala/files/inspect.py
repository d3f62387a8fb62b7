"""Look at a weights file or folder, headers only, and say what it is, or exactly what is wrong with it.

Nothing here reads a tensor: a 10 GB file is judged by its first kilobytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..architecture.components import TextEncoder, read_autoencoder, read_text_encoder
from ..architecture.keys import NUMBERINGS, Coverage, Numbering, Shape, coverage, names, read_layout
from ..architecture.layout import KOALA_NAMES, Layout, is_subnetwork, name
from ..architecture.lineage import Kept, check_kept
from ..releases import SCHEDULER_CONFIG, Identity, identify, release_for
from . import other_models as foreign

FLOAT_TYPES = {
    "F32": ("fp32", 4),
    "F16": ("fp16", 2),
    "BF16": ("bf16", 2),
    "F8_E4M3": ("fp8_e4m3fn", 1),
    "F8_E5M2": ("fp8_e5m2", 1),
}
"""Types that a U-Net's weights may have in a file: our name of each, and bytes a weight."""
QUANTISED = (".scale_weight", ".weight_scale", "scaled_fp8", ".comfy_quant", ".SCB", ".absmax", ".qweight")
UNET_PREFIX = "model.diffusion_model."
HEADER_LIMIT = 100_000_000  # the safetensors library's own, in bytes
CLIP_PREFIXES = ("conditioner.embedders.0.", "conditioner.embedders.1.")
VAE_PREFIX = "first_stage_model."
SCHEDULER_KEY = "koala.config.scheduler"
"""Metadata in which a single file carries what a folder has in scheduler_config.json, as JSON."""
KEPT_KEY = "koala.transformers"
"""Metadata in which a student of one's own says which of SDXL's transformer blocks it kept, as JSON: attention module
-> list of SDXL's indices, as in ``lineage.KEPT_TRANSFORMERS``."""

WEIGHT_NAMES = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors")
TEXT_NAMES = ("model.fp16.safetensors", "model.safetensors")
FOLDER_PARTS = {"unet": WEIGHT_NAMES, "text_encoder": TEXT_NAMES, "text_encoder_2": TEXT_NAMES, "vae": WEIGHT_NAMES}
"""The weights that a published folder holds, each by the names under which it may lie, the preferred one first."""


class CheckpointError(ValueError):
    """A file that cannot be used; the first line names it, what it is, what was expected and what to do."""

    __module__ = "koala"  # the host prefixes an error's text with this; a pack's true module name is a path


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: type and shape of every tensor, and the metadata."""

    path: Path
    types: Mapping[str, str] = field(repr=False)
    shapes: Mapping[str, Shape] = field(repr=False)
    metadata: Mapping[str, str]

    def under(self, prefix: str) -> dict[str, Shape]:
        """Shapes of the tensors whose names begin with ``prefix``, which is taken off."""
        return {key[len(prefix) :]: shape for key, shape in self.shapes.items() if key.startswith(prefix)}

    @cached_property
    def unet_prefix(self) -> str:
        return UNET_PREFIX if any(key.startswith(UNET_PREFIX) for key in self.shapes) else ""


@dataclass(frozen=True)
class UNetFile:
    """A file that holds a usable U-Net: where, which layout, named how, of which main type, of how many bytes."""

    path: Path
    prefix: str
    layout: Layout
    numbering: Numbering
    dtype: str
    bytes: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Model:
    """A U-Net file together with what is known of its variant and schedule."""

    unet: UNetFile
    identity: Identity
    scheduler: Mapping[str, object] = field(default_factory=lambda: SCHEDULER_CONFIG)
    kept: Kept | None = None


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder with every part in place."""

    model: Model
    text_encoder: Path
    text_encoder_2: Path
    vae: Path


def label(path: Path) -> str:
    """A file's name, with the folder's where it has the name that it has in every published folder."""
    published = path.name in FOLDER_PARTS.get(path.parent.name, ())
    return "/".join(path.parts[-3:]) if published else path.name


def read_header(path: Path, wanted: str = "KOALA weights") -> Header:
    """Read and check a safetensors header; ``wanted`` is what an error says was expected in the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is empty, cut short, a web page, a pickle, or otherwise no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        raw = file.read(length if 2 <= length <= HEADER_LIMIT else 56)
    if len(raw) < length <= HEADER_LIMIT and raw.startswith(b'{"'):
        raise CheckpointError(_cut_short(path, size, f"at least {8 + length:,}"))
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        types = {key: value["dtype"] for key, value in header.items()}
        shapes = {key: tuple(value["shape"]) for key, value in header.items()}
        end = 8 + length + max((value["data_offsets"][1] for value in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise CheckpointError(_not_safetensors(path, size, start + raw[:56], wanted)) from None
    if size < end:
        raise CheckpointError(_cut_short(path, size, f"the {end:,}"))
    try:
        with safe_open(path, framework="np"):
            pass  # the library checks every type, shape and offset as it opens a file, and reads no tensor
    except SafetensorError as error:
        raise CheckpointError(
            f"{label(path)} is damaged: its header does not describe its {size:,} bytes ({error}); expected a "
            f".safetensors file of {wanted}. Fetch the file again."
        ) from None
    return Header(path, types, shapes, metadata)


def inspect_unet(path: Path) -> UNetFile:
    """Recognise the KOALA U-Net in a file, bare or inside a checkpoint, in any numbering.

    Raises CheckpointError with what the file is instead, or with what its U-Net lacks.
    """
    header = read_header(path)
    prefix = header.unet_prefix
    found = header.under(prefix)
    layout, numbering = _recognise(header, found)
    types = Counter[str]()
    for key in found.keys() & names(layout, numbering):
        types[header.types[prefix + key]] += prod(found[key])
    unusable = sorted(set(types) - set(FLOAT_TYPES))
    if unusable or any(key.endswith(QUANTISED) for key in found):
        raise CheckpointError(
            f"{label(path)} holds {name(layout)}'s U-Net quantised or in an unusual type ({', '.join(sorted(types))}); "
            f"expected plain weights in one of {', '.join(FLOAT_TYPES)}. Quantised files need the loader of the pack "
            f"that made them; take the published file instead: {_published_unet(layout, label(path))}"
        )
    cover = coverage(layout, numbering, found)
    if not cover.exact:
        raise CheckpointError(_incomplete(path, layout, numbering, cover))
    return UNetFile(
        path=path,
        prefix=prefix,
        layout=layout,
        numbering=numbering,
        dtype=FLOAT_TYPES[types.most_common(1)[0][0]][0],
        bytes=sum(FLOAT_TYPES[kind][1] * count for kind, count in types.items()),
        metadata=header.metadata,
    )


def inspect_model(path: Path) -> Model:
    """A bare U-Net file or a single-file checkpoint's U-Net, with its variant as far as the file tells it."""
    unet = inspect_unet(path)
    stated = _parse_json(unet.metadata.get(SCHEDULER_KEY, "{}"), f"{label(path)}: the metadata {SCHEDULER_KEY}")
    scheduler = {**SCHEDULER_CONFIG, **stated}
    if scheduler["prediction_type"] != "epsilon":
        raise CheckpointError(
            f"{label(path)}: the metadata {SCHEDULER_KEY} asks for {scheduler['prediction_type']} prediction; every "
            f"KOALA predicts epsilon. Save the model again, or take the published file: "
            f"{_published_unet(unet.layout, label(path))}"
        )
    return Model(unet, identify(unet.metadata, {}, "", label(path)), scheduler, _kept(unet))


def inspect_checkpoint(path: Path) -> Model:
    """A single-file KOALA checkpoint: U-Net, both text encoders and autoencoder.

    Raises CheckpointError also where one of the parts beside the U-Net is absent.
    """
    model = inspect_model(path)
    require_checkpoint_parts(path)
    return model


def require_checkpoint_parts(path: Path) -> None:
    """Check that a single-file SDXL-family checkpoint brings both text encoders and the autoencoder."""
    header = read_header(path)
    absent = [
        part
        for part, prefix in zip(("CLIP-L", "CLIP-G", "VAE"), (*CLIP_PREFIXES, VAE_PREFIX), strict=True)
        if not header.under(prefix)
    ]
    if absent:
        raise CheckpointError(
            f"{label(path)} holds {foreign.describe(header.shapes)} but no {' and no '.join(absent)}; expected an SDXL "
            f"checkpoint with both text encoders and a VAE. Choose another checkpoint, or the source "
            f'"U-Net + text encoders + VAE".'
        )
    try:
        read_autoencoder(header.under(VAE_PREFIX))
    except KeyError as missing:
        raise CheckpointError(
            f"{label(path)}: its VAE lacks the tensor {VAE_PREFIX}{missing.args[0]}; fetch the file again."
        ) from None


def inspect_text_encoder(path: Path) -> str:
    """Tell CLIP-L from CLIP-G: ``"l"`` or ``"g"``. Raises CheckpointError for anything else."""
    encoder = _text_encoder(path)
    # a CLIP-L of 12 layers may carry an unused projection; SDXL only ever projects with CLIP-G
    return "g" if encoder.projection and encoder.layers != 12 else "l"


def _text_encoder(path: Path) -> TextEncoder:
    header = read_header(path)
    try:
        return read_text_encoder(header.shapes)
    except KeyError as missing:
        raise CheckpointError(
            f"{label(path)} is {foreign.describe(header.shapes)}; expected a CLIP-L or CLIP-G text encoder of SDXL as "
            f"published in text_encoder/ and text_encoder_2/ (missing: {missing.args[0]}). "
            f"Put SDXL's text encoders into models/text_encoders."
        ) from None


def require_text_width(layout: Layout, clip_l: Path, clip_g: Path) -> None:
    """Check that two text encoders are as wide as a U-Net asks. Raises CheckpointError where they are not."""
    first, second = _text_encoder(clip_l), _text_encoder(clip_g)
    width = first.hidden + second.hidden
    if (width, second.projection) != (layout.context, layout.pooled):
        raise CheckpointError(
            f"{label(clip_l)} and {label(clip_g)} give text of width {width} and pooled {second.projection}; "
            f"{name(layout)} expects {layout.context} and {layout.pooled}. Choose the text encoders that belong to the "
            f"U-Net."
        )


def inspect_vae(path: Path) -> None:
    """Check that a file is an autoencoder (AutoencoderKL). Raises CheckpointError where it is not."""
    header = read_header(path)
    try:
        sizes = read_autoencoder(header.shapes)
    except KeyError as missing:
        raise CheckpointError(
            f"{label(path)} is {foreign.describe(header.shapes)}; expected SDXL's VAE (missing: {missing.args[0]}). "
            f"Put SDXL's VAE into models/vae."
        ) from None
    if sizes.latent_channels != 4:
        raise CheckpointError(
            f"{label(path)} is a VAE with {sizes.latent_channels} latent channels; expected SDXL's with 4. "
            f"Put SDXL's VAE into models/vae."
        )


def inspect_folder(folder: Path) -> Folder:
    """Recognise a KOALA folder as published on Hugging Face, fp16 or fp32, whichever transformers saved it.

    Raises CheckpointError naming the part that is absent and where it is published.
    """
    found: dict[str, Path] = {}
    for part, choices in FOLDER_PARTS.items():
        present = [folder / part / choice for choice in choices if (folder / part / choice).is_file()]
        if not present:
            raise CheckpointError(_missing_part(folder, part, choices))
        found[part] = present[0]
    unet = inspect_unet(found["unet"])
    first, second = inspect_text_encoder(found["text_encoder"]), inspect_text_encoder(found["text_encoder_2"])
    if (first, second) != ("l", "g"):
        raise CheckpointError(
            f"{folder.name}/text_encoder and text_encoder_2 hold CLIP-{first.upper()} and CLIP-{second.upper()}; "
            f"expected CLIP-L and CLIP-G. Fetch both again from {release_for(unet.layout, folder.name).url()}."
        )
    require_text_width(unet.layout, found["text_encoder"], found["text_encoder_2"])
    inspect_vae(found["vae"])
    scheduler = {**SCHEDULER_CONFIG, **_read_json(folder / "scheduler" / "scheduler_config.json")}
    if scheduler["prediction_type"] != "epsilon":
        raise CheckpointError(
            f"{folder.name}/scheduler/scheduler_config.json asks for {scheduler['prediction_type']} prediction; every "
            f"KOALA predicts epsilon. Restore the published file: "
            f"{release_for(unet.layout, folder.name).url('scheduler/scheduler_config.json')}"
        )
    origin = str(_read_json(folder / "unet" / "config.json").get("_name_or_path", ""))
    identity = identify(unet.metadata, scheduler, origin, folder.name)
    model = Model(unet, identity, scheduler, _kept(unet))
    return Folder(model, found["text_encoder"], found["text_encoder_2"], found["vae"])


def _kept(unet: UNetFile) -> Kept | None:
    """The transformer blocks that the file says it kept of SDXL's; None where it says nothing."""
    if KEPT_KEY not in unet.metadata:
        return None
    place = f"{label(unet.path)}: the metadata {KEPT_KEY}"
    stated = _parse_json(unet.metadata[KEPT_KEY], place)
    kept = {module: tuple(found) for module, found in stated.items() if isinstance(found, list)}
    try:
        if len(kept) < len(stated) or any(type(index) is not int for found in kept.values() for index in found):
            raise ValueError("it has more than lists of whole numbers")
        check_kept(unet.layout, kept)
    except ValueError as error:
        raise CheckpointError(f"{place} does not fit {name(unet.layout)}: {error}. Save the model again.") from None
    return kept


def _recognise(header: Header, found: Mapping[str, Shape]) -> tuple[Layout, Numbering]:
    """Layout and numbering of a U-Net that is a KOALA or near enough to one to say what it lacks."""
    file = label(header.path)
    other = foreign.recognise(header.shapes, found)
    if other:
        raise CheckpointError(
            f"{file} is {other.name}; expected a KOALA U-Net (an SDXL sub-network such as KOALA-700M). "
            f"Load it with {other.loader}."
        )
    try:
        read: tuple[Layout, Numbering] | None = read_layout(found)
    except (KeyError, ValueError, IndexError):
        read = None
    if read and is_subnetwork(read[0]) and coverage(*read, found).exact:
        return read
    # damaged: say what is wrong against the layout that shares most names with the file
    candidates = [(layout, numbering) for layout in KOALA_NAMES for numbering in NUMBERINGS]
    if read and is_subnetwork(read[0]):
        candidates.insert(0, read)

    def likeness(candidate: tuple[Layout, Numbering]) -> float:
        wanted = set(names(*candidate))
        return len(wanted & found.keys()) / len(wanted | found.keys())

    best = max(
        candidates,
        key=lambda candidate: (likeness(candidate), -len(coverage(candidate[0], candidate[1], found).misshapen)),
    )
    if likeness(best) < 0.1:
        raise CheckpointError(
            f"{file} is {foreign.describe(header.shapes)}; expected a KOALA U-Net with tensors such as "
            f"down_blocks.0.resnets.0.conv1.weight or input_blocks.1.0.in_layers.2.weight. "
            f"Take the published file: {_published_unet(best[0], file)}"
        )
    return best


def _incomplete(path: Path, layout: Layout, numbering: Numbering, cover: Coverage) -> str:
    faults = [
        f"{len(listed)} {word} (first: {', '.join(listed[:3])})"
        for word, listed in (("missing", cover.missing), ("extra", cover.extra), ("misshapen", cover.misshapen))
        if listed
    ]
    return (
        f"{label(path)} does not match {name(layout)}'s {len(names(layout, numbering))} tensors: {'; '.join(faults)}. "
        f"Fetch the published file again: {_published_unet(layout, label(path))}"
    )


def _published_unet(layout: Layout, file: str) -> str:
    return release_for(layout, file).url(f"unet/{WEIGHT_NAMES[0]}")


def _missing_part(folder: Path, part: str, choices: tuple[str, ...]) -> str:
    wanted = f"{folder.name}/{part}/{choices[0]} (or {choices[1]})"
    release = release_for(next(iter(KOALA_NAMES)), folder.name)
    url = release.url(f"{part}/{choices[1] if part == 'vae' else choices[0]}")
    pickled = sorted(item.name for item in (folder / part).glob("*.bin")) if (folder / part).is_dir() else []
    found = f" Only {', '.join(pickled)} is there, a pickle, which is not loaded." if pickled else ""
    return f"{wanted} is not there; a KOALA folder needs it.{found} It is published at {url}"


def _cut_short(path: Path, size: int, promised: str) -> str:
    return (
        f"{label(path)} is cut short: it has {size:,} of {promised} bytes that its header promises. "
        f"The download or copy broke off; fetch the file again."
    )


def _not_safetensors(path: Path, size: int, start: bytes, wanted: str) -> str:
    text = start.lstrip().lower()
    if size == 0:
        what = "is empty"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")) or b"<html" in text:
        what = "is a web page, not weights (a download link that needed a login or led to a page)"
    elif start.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not weights (cloned without git-lfs)"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        what = "is a pickle (.ckpt, .bin, .pt), which may run code when it is read and is not loaded"
    elif start.startswith(b"GGUF"):
        what = "is a GGUF file, which needs a GGUF loader's node"
    else:
        what = f"is no safetensors file (it begins with {start[:12]!r})"
    return f"{label(path)} {what}; expected a .safetensors file of {wanted}. Fetch the published file again."


def _read_json(path: Path) -> dict[str, object]:
    """A small config file's contents, empty where there is no such file."""
    if not path.is_file():
        return {}
    return _parse_json(path.read_bytes(), "/".join(path.parts[-3:]))


def _parse_json(text: str | bytes, place: str) -> dict[str, object]:
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{place} holds no JSON object; expected a model's configuration. Restore the published file."
        )
    return config
