"""Sizes of text encoders and autoencoders, read from the shapes of the real networks and of small ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from koala_sdxl.koala.architecture.component_detection import read_autoencoder, read_text_encoder
from koala_sdxl.koala.architecture.component_keys import text_name
from koala_sdxl.koala.architecture.components import Autoencoder, TextEncoder
from tests.unit import reference

CLIP_L = TextEncoder(hidden=768, intermediate=3072, layers=12, projection=None)
CLIP_G = TextEncoder(hidden=1280, intermediate=5120, layers=32, projection=1280)


@pytest.mark.parametrize(
    ("build", "width", "layers", "sizes", "heads"),
    [
        (reference.clip_l, 768, 12, CLIP_L, 12),
        (reference.clip_g, 1280, 32, CLIP_G, 20),
        (reference.clip_l, 32, 3, TextEncoder(32, 128, 3, None), 1),
        (reference.clip_g, 64, 3, TextEncoder(64, 256, 3, 64), 1),
    ],
)
@pytest.mark.parametrize("drop", ["", "text_model."])
def test_text_encoder(
    build: Callable[[int, int], reference.Shapes], width: int, layers: int, sizes: TextEncoder, heads: int, drop: str
) -> None:
    read = read_text_encoder({key.removeprefix(drop): shape for key, shape in build(width, layers).items()})
    assert read == sizes
    assert read.heads == heads


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layers.0.mlp.fc1.bias", "text_model.encoder.layers.0.mlp.fc1.bias"),
        ("text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("text_projection.weight", "text_projection.weight"),
        ("logit_scale", "logit_scale"),
    ],
)
def test_text_names_are_those_of_transformers_4(name: str, expected: str) -> None:
    assert text_name(name) == expected


@pytest.mark.parametrize(
    "lost",
    [
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.11.mlp.fc2.bias",
        "text_model.encoder.layers.5.self_attn.q_proj.weight",
        "text_model.final_layer_norm.weight",
    ],
)
def test_a_text_encoder_with_a_hole(lost: str) -> None:
    found = dict(reference.clip_l())
    del found[lost]
    with pytest.raises(KeyError, match=lost):
        read_text_encoder(found)


def test_no_text_encoder() -> None:
    with pytest.raises(KeyError, match=r"encoder\.layers\.0"):
        read_text_encoder(reference.vae())


def test_a_hostile_layer_number_is_counted_once() -> None:
    found = {**reference.clip_l(32, 3), f"text_model.encoder.layers.{10**12}.mlp.fc1.weight": (128, 32)}
    with pytest.raises(KeyError, match=r"encoder\.layers\.3"):
        read_text_encoder(found)


@pytest.mark.parametrize("rename", [dict, reference.original_vae], ids=["diffusers", "original"])
@pytest.mark.parametrize("channels", [(128, 256, 512, 512), (32, 64, 96, 96)])
def test_autoencoder(rename: type[reference.Shapes], channels: tuple[int, ...]) -> None:
    read = read_autoencoder(rename(reference.vae(channels)))
    assert read == Autoencoder(channels=channels, layers=2, latent_channels=4, embed=4, image_channels=3)


@pytest.mark.parametrize("lost", ["decoder.conv_in.weight", "post_quant_conv.weight", "encoder.conv_in.weight"])
@pytest.mark.parametrize("damage", ["drop", "flatten"])
def test_an_autoencoder_with_a_hole(lost: str, damage: str) -> None:
    found = dict(reference.vae())
    if damage == "drop":
        del found[lost]
    else:
        found[lost] = (512,)
    with pytest.raises(KeyError, match=lost):
        read_autoencoder(found)


def test_no_autoencoder() -> None:
    with pytest.raises(KeyError, match=r"encoder\.down\.0\.block\.0\.conv1\.weight"):
        read_autoencoder(reference.clip_l())
