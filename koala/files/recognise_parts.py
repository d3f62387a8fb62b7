"""Whether a file holds a complete text encoder or VAE, and of which sizes; or what is wrong with it, in words.

What ``recognise`` is for the U-Net: every tensor that the sizes ask for, in its shape and a plain type, and none
besides but those that are known to be unused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from ..architecture.component_detection import (
    autoencoder_sizes,
    expected_text_tensors,
    expected_vae_tensors,
    text_encoder_sizes,
)
from ..architecture.component_keys import unused_in_text_encoder, unused_in_vae
from ..architecture.components import Autoencoder, TextEncoder, TextKind
from ..architecture.keys import Shape, compare
from .conventions import label
from .header import CheckpointError, Source
from .other_models import describe
from .recognise import require_plain

OF_A_CHECKPOINT = "Fetch the file again, or choose another checkpoint."


def recognise_text_encoder(source: Source, kind: TextKind | None = None, outer: str = "") -> TextEncoder:
    """Sizes of the text encoder in a source, which is complete.

    Args:
        source: the file and the prefix of the network's tensors.
        kind: the encoder that its place in a checkpoint says it is; None where only its sizes tell.
        outer: prefix of all that belongs to it in the file, where that is shorter than the network's.

    Raises CheckpointError with what is wrong with it.
    """
    shapes = source.shapes
    try:
        size = text_encoder_sizes(shapes)
    except KeyError as missing:
        if kind:
            raise CheckpointError(
                f"{label(source.path)}: its CLIP-{kind.upper()} has no layers; expected tensors under {source.prefix} "
                f"with the names of transformers or open_clip. {OF_A_CHECKPOINT}"
            ) from None
        raise CheckpointError(
            f"{label(source.path)} is {describe(source.header.shapes)}; expected a CLIP-L or CLIP-G text encoder of "
            f"SDXL, under the names of transformers or open_clip (missing: {missing.args[0]}). Put SDXL's text "
            f"encoders into models/text_encoders."
        ) from None
    role = kind or size.kind
    if role == "g":
        size = replace(size, projection=size.hidden)
    remedy = OF_A_CHECKPOINT if kind else "Fetch the text encoder again."
    part = Part(source, outer or source.prefix, f"CLIP-{role.upper()}", remedy)
    part.require_sizes(size.fault)
    part.require_exact(expected_text_tensors(size, shapes), lambda key: unused_in_text_encoder(key, role))
    return size


def recognise_vae(source: Source) -> Autoencoder:
    """Sizes of the autoencoder in a source, which is complete. Raises CheckpointError with what is wrong with it."""
    shapes = source.shapes
    try:
        size = autoencoder_sizes(shapes)
    except KeyError as missing:
        if source.prefix:
            raise CheckpointError(
                f"{label(source.path)}: its VAE has no stages; expected tensors such as "
                f"{source.prefix}{missing.args[0]}. {OF_A_CHECKPOINT}"
            ) from None
        raise CheckpointError(
            f"{label(source.path)} is {describe(source.header.shapes)}; expected SDXL's VAE (missing: "
            f"{missing.args[0]}). Put SDXL's VAE into models/vae."
        ) from None
    part = Part(source, source.prefix, "VAE", OF_A_CHECKPOINT if source.prefix else "Put SDXL's VAE into models/vae.")
    part.require_sizes(size.fault)
    part.require_exact(expected_vae_tensors(size, shapes), unused_in_vae)
    return size


class Part(NamedTuple):
    """A text encoder or VAE that is judged."""

    source: Source
    outer: str
    """Prefix of all that belongs to it in the file; the network's own, ``source.prefix``, begins with it."""
    name: str
    remedy: str

    def require_sizes(self, fault: str) -> None:
        """Raise CheckpointError where there is a fault."""
        if fault:
            raise CheckpointError(f"{label(self.source.path)}: its {self.name} {fault}. {self.remedy}")

    def require_exact(self, wanted: Mapping[str, Shape], unused: Callable[[str], bool]) -> None:
        """Check that all that lies under ``outer`` is this network's tensors, in plain types, and unused ones.

        Args:
            wanted: the network's tensors, by their names without the prefix.
            unused: whether a tensor of this name does no harm.

        Raises CheckpointError.
        """
        header, network = self.source.header, self.source.prefix
        named = {network + key: shape for key, shape in wanted.items()}

        def inner(key: str) -> str:
            return key.removeprefix(network if key.startswith(network) else self.outer)

        found = {
            key: shape
            for key, shape in header.shapes.items()
            if key in named or (key.startswith(self.outer) and not unused(inner(key)))
        }
        require_plain(
            f"{label(header.path)} holds its {self.name}",
            {header.dtypes[key] for key in named.keys() & found.keys()},
            found,
            self.remedy,
        )
        cover = compare(named, found)
        if not cover.exact:
            raise CheckpointError(
                f"{label(header.path)}: its {self.name} does not match the {len(named)} tensors that its sizes ask "
                f"for: {cover}. {self.remedy}"
            )
