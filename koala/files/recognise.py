"""Which U-Net a file holds, and in which numbering; or what is wrong with it, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ..architecture.detection import find_layout
from ..architecture.keys import NUMBERINGS, Numbering, Shape, coverage, names
from ..architecture.layout import KOALA_NAMES, Layout, fault, is_subnetwork, name
from ..releases import RELEASES, release_for
from . import other_models
from .conventions import WEIGHT_NAMES, folders_above, label
from .dtypes import BY_STORED_NAME
from .header import CheckpointError, Header

QUANTISED = (
    *(".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_2", ".input_scale", "scaled_fp8"),
    *(".comfy_quant", ".weight_format", ".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".zero_point"),
)
"""Ends of names that only files of quantised weights have."""
OTHER_PREDICTIONS = ("v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max")
"""Tensors that tell ComfyUI that a U-Net of SDXL's family predicts something else (supported_models.py)."""
PREDICTION_KEY = "modelspec.prediction_type"
"""ModelSpec's metadata: "epsilon", or "v"."""
LEAST_LIKENESS = 0.1
"""Share of names that a damaged file must have in common with a KOALA's to be compared with it."""


def recognise_unet(header: Header, unet: Mapping[str, Shape]) -> tuple[Layout, Numbering]:
    """Layout and numbering of a KOALA's U-Net, or of the one that a damaged U-Net is most like.

    Args:
        header: of the whole file.
        unet: shapes of the U-Net's tensors, prefix taken off.

    Raises CheckpointError with what the file is instead.
    """
    file = label(header.path)
    other = other_models.recognise(header.shapes, unet)
    if other:
        raise CheckpointError(
            f"{file} is {other.name}; expected a KOALA U-Net (an SDXL sub-network such as KOALA-700M). {other.remedy}"
        )
    read = find_layout(unet)
    if read and not is_subnetwork(read[0]):
        read = None
    if read and coverage(*read, unet).exact:
        if odd := fault(read[0]):
            raise CheckpointError(
                f"{file} is an SDXL sub-network with {odd}. ComfyUI and diffusers cannot build it; take the published "
                f"file: {published_unet(read[0], header.path)}"
            )
        return read
    nearest = _most_alike(unet, read)
    if _likeness(nearest, unet) < LEAST_LIKENESS:
        raise CheckpointError(
            f"{file} is {other_models.describe(header.shapes)}; expected a KOALA U-Net with tensors such as "
            f"down_blocks.0.resnets.0.conv1.weight or input_blocks.1.0.in_layers.2.weight. "
            f"Take the published file: {published_unet(nearest[0], header.path)}"
        )
    return nearest


def require_plain(subject: str, stored: Collection[str], names: Iterable[str], remedy: str) -> None:
    """Check that weights are plain floating-point numbers.

    Args:
        subject: what holds which weights, for the error.
        stored: their types' names in the header.
        names: of all tensors, which give quantised weights away.
        remedy: what to do, for the error.

    Raises CheckpointError.
    """
    marks = [key for key in names if key.endswith(QUANTISED)]
    if marks or set(stored) - BY_STORED_NAME.keys():
        found = ", ".join((*sorted(stored), *marks[:1]))
        raise CheckpointError(
            f"{subject} quantised or in an unusual type ({found}); expected plain weights in one of "
            f"{', '.join(BY_STORED_NAME)}. Quantised files need the loader of the pack that made them. {remedy}"
        )


def require_epsilon(header: Header) -> None:
    """Check that nothing in a file says that its U-Net predicts anything but epsilon. Raises CheckpointError."""
    stated = header.metadata.get(PREDICTION_KEY, "")
    signs = [f"the tensor {name}" for name in OTHER_PREDICTIONS if name in header.shapes]
    signs += [f"the metadata {PREDICTION_KEY} = {stated}"] if stated.startswith("v") else []
    if signs:
        raise CheckpointError(
            f"{label(header.path)} does not predict epsilon, as {signs[0]} tells; every KOALA does. Choose another "
            f"file."
        )


def require_exact(path: Path, layout: Layout, numbering: Numbering, unet: Mapping[str, Shape]) -> None:
    """Check that a U-Net has every tensor of its layout, in its shape, and no other. Raises CheckpointError."""
    cover = coverage(layout, numbering, unet)
    if cover.exact:
        return
    raise CheckpointError(
        f"{label(path)} does not match {name(layout)}'s {len(names(layout, numbering))} tensors: {cover}. "
        f"Fetch {source_of(layout, path)}"
    )


def source_of(layout: Layout, path: Path) -> str:
    """Where to fetch a file of this layout from, for an error; only what was released is published."""
    if any(release.layout == layout for release in RELEASES):
        return f"the published file: {published_unet(layout, path)}"
    return "the file again from where it came from."


def published_unet(layout: Layout, path: Path) -> str:
    """Address of the published U-Net that a file most likely is."""
    return release_for(layout, label(path), folders_above(path)).url(f"unet/{WEIGHT_NAMES[0]}")


def _most_alike(unet: Mapping[str, Shape], read: tuple[Layout, Numbering] | None) -> tuple[Layout, Numbering]:
    """The layout and numbering that share most names, then most shapes, with a damaged U-Net."""
    candidates = [(layout, numbering) for layout in KOALA_NAMES for numbering in NUMBERINGS]
    if read:
        candidates.insert(0, read)

    def closeness(candidate: tuple[Layout, Numbering]) -> tuple[float, int]:
        layout, numbering = candidate
        return _likeness(candidate, unet), -len(coverage(layout, numbering, unet).misshapen)

    return max(candidates, key=closeness)


def _likeness(candidate: tuple[Layout, Numbering], unet: Mapping[str, Shape]) -> float:
    """Share of all names that a layout and a U-Net have in common, 0 to 1."""
    wanted = set(names(*candidate))
    return len(wanted & unet.keys()) / len(wanted | unet.keys())
