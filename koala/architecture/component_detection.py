"""Sizes of text encoders and autoencoder, read from their tensors' names and shapes: the other direction of
``component_keys``.

A size is what most tensors say, so that one damaged tensor does not change it. A width that one of SDXL's own models
has implies all its other sizes: a CLIP-L that lost its last layer is damaged, not another encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from .component_keys import (
    VAE_MATRICES,
    TextNaming,
    projection_name,
    text_naming,
    text_tensors,
    vae_naming,
    vae_tensors,
)
from .components import LONG_PROMPT_TOKENS, PROMPT_TOKENS, SDXL_TEXT_ENCODERS, SDXL_VAE, Autoencoder, TextEncoder
from .keys import Shape

_LAYERS: dict[TextNaming, str] = {
    "transformers": "text_model.encoder.layers.",
    "transformers 5": "encoder.layers.",
    "open_clip": "transformer.resblocks.",
}
"""What the names of a text encoder's layers begin with."""
_POSITIONS = ("embeddings.position_embedding.weight", "positional_embedding")


def read_text_encoder(found: Mapping[str, Shape]) -> TextEncoder:
    """Read a text encoder's sizes from its tensors, under any of the namings.

    Raises KeyError with the name of the first tensor that is missing, or of another shape.
    """
    size = text_encoder_sizes(found)
    _require(expected_text_tensors(size, found), found)
    return size


def read_autoencoder(found: Mapping[str, Shape]) -> Autoencoder:
    """Read an autoencoder's sizes from its tensors, under any of the namings.

    Raises KeyError with the name of the first tensor that is missing, or of another shape.
    """
    size = autoencoder_sizes(found)
    _require(expected_vae_tensors(size, found), found)
    return size


def _require(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise KeyError(name)


def expected_text_tensors(size: TextEncoder, found: Mapping[str, Shape]) -> dict[str, Shape]:
    """Every tensor of a text encoder of this size, name -> shape, in the naming that a file has."""
    return text_tensors(size, text_naming(found), projection_name(found))


def expected_vae_tensors(size: Autoencoder, found: Mapping[str, Shape]) -> dict[str, Shape]:
    """Every tensor of an autoencoder of this size, name -> shape, in the naming that a file has.

    The attention's matrices are convolutions of 1x1 or not, as the file has them: some tools rename without reshaping.
    """

    def form(name: str, shape: Shape) -> Shape:
        forms = (shape[:2], (*shape[:2], 1, 1)) if VAE_MATRICES.search(name) else (shape,)
        return found[name] if found.get(name) in forms else shape

    return {name: form(name, shape) for name, shape in vae_tensors(size, vae_naming(found)).items()}


def text_encoder_sizes(found: Mapping[str, Shape]) -> TextEncoder:
    """The sizes that an encoder's tensors show, under any of the namings, or those of SDXL's encoder of this width.

    Raises KeyError, with the name of a tensor that every encoder has, where they show none.
    """
    prefix = _LAYERS[text_naming(found)]
    hidden = _most_common(_axis(found, prefix, ("layer_norm1.", "ln_1.", "layer_norm2.", "ln_2."), 0))
    if hidden is None:
        raise KeyError(f"{prefix}0.layer_norm1.weight")
    projection = hidden if any(name.startswith("text_projection") for name in found) else None
    positions = next(
        (shape[0] for name, shape in found.items() if name.endswith(_POSITIONS) and len(shape) == 2), PROMPT_TOKENS
    )
    positions = positions if positions == LONG_PROMPT_TOKENS else PROMPT_TOKENS
    if known := SDXL_TEXT_ENCODERS.get(hidden):
        return replace(known, projection=known.projection or projection, positions=positions)
    return TextEncoder(
        hidden=hidden,
        intermediate=_most_common(_axis(found, prefix, ("mlp.fc1.", "mlp.c_fc."), 0)) or 4 * hidden,
        layers=_count(found, prefix),
        projection=projection,
        positions=positions,
    )


def autoencoder_sizes(found: Mapping[str, Shape]) -> Autoencoder:
    """The sizes that an autoencoder's tensors show, under any of the namings, or those of SDXL's of this width.

    Raises KeyError, with the name of a tensor that every autoencoder has, where they show none.
    """
    original = vae_naming(found) == "original"
    stage, layer = ("encoder.down.", "block.") if original else ("encoder.down_blocks.", "resnets.")
    stages = [f"{stage}{index}.{layer}" for index in range(_count(found, stage))]
    channels = [_most_common(_axis(found, prefix, ("0.conv", "0.norm2.", "0.nin_"), 0)) for prefix in stages]
    if not channels or channels[0] is None:
        raise KeyError(f"{stage}0.{layer}0.conv1.weight")
    latents = [
        *_axis(found, "decoder.conv_in.weight", ("",), 1),
        *_axis(found, "post_quant_conv.", ("",), 0),
        *(width // 2 for width in _axis(found, "encoder.conv_out.", ("",), 0)),
    ]
    latent_channels = _most_common(latents) or SDXL_VAE.latent_channels
    if channels[0] == SDXL_VAE.channels[0]:
        return replace(SDXL_VAE, latent_channels=latent_channels, embed=latent_channels)
    return Autoencoder(
        channels=tuple(width or 0 for width in channels),
        layers=_most_common(_count(found, prefix) for prefix in stages) or 0,
        latent_channels=latent_channels,
        embed=latent_channels,
        image_channels=SDXL_VAE.image_channels,
    )


def _axis(found: Mapping[str, Shape], prefix: str, parts: tuple[str, ...], axis: int) -> Iterator[int]:
    """One dimension of every tensor whose name begins with ``prefix`` and has one of ``parts`` behind it."""
    for name, shape in found.items():
        if name.startswith(prefix) and len(shape) > axis and any(part in name[len(prefix) :] for part in parts):
            yield shape[axis]


def _most_common(sizes: Iterable[int]) -> int | None:
    """The size that most tensors have; None where there is none above zero."""
    counted = Counter(size for size in sizes if size > 0)
    return counted.most_common(1)[0][0] if counted else None


def _count(found: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".", 1)[0] for name in found if name.startswith(prefix)})
