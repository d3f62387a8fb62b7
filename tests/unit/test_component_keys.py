"""The tables of text encoders' and VAE's tensors are those of transformers, open_clip and diffusers, at every size."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import AutoencoderKL

from koala_sdxl.koala.architecture import component_keys as tables
from koala_sdxl.koala.architecture.component_detection import autoencoder_sizes, text_encoder_sizes
from koala_sdxl.koala.architecture.component_keys import TextNaming, text_tensors, vae_tensors
from koala_sdxl.koala.architecture.components import CLIP_G, CLIP_L, SDXL_VAE, Autoencoder, TextEncoder
from koala_sdxl.koala.architecture.keys import Shape
from tests.unit import reference
from tests.unit.reference import Shapes

TINY_L, TINY_G = TextEncoder(32, 128, 3, None), TextEncoder(64, 256, 3, 64)
ENCODERS = {
    "CLIP-L": (CLIP_L, lambda: reference.clip_l()),
    "CLIP-G": (CLIP_G, lambda: reference.clip_g()),
    "tiny CLIP-L": (TINY_L, lambda: reference.clip_l(32, 3)),
    "tiny CLIP-G": (TINY_G, lambda: reference.clip_g(64, 3)),
}


def under(naming: TextNaming, found: Shapes) -> Shapes:
    """An encoder's tensors, transformers 4's names, as another tool would write them."""
    if naming == "transformers 5":
        return {name.removeprefix("text_model."): shape for name, shape in found.items()}
    renamed = reference.open_clip(found) if naming == "open_clip" else dict(found)
    return {name: shape for name, shape in renamed.items() if name != "logit_scale"}


@pytest.mark.parametrize("naming", ["transformers", "transformers 5", "open_clip"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_text_encoders_tensors(encoder: str, naming: TextNaming) -> None:
    size, build = ENCODERS[encoder]
    found = under(naming, build())
    raw = naming == "open_clip"
    projection = tables.TRANSPOSED_PROJECTION if raw else tables.PROJECTION
    assert text_tensors(size, naming, projection) == found
    assert text_encoder_sizes(found) == size
    assert (tables.text_naming(found), tables.projection_name(found)) == (naming, projection)


def test_long_clip_has_more_positions() -> None:
    name = "text_model.embeddings.position_embedding.weight"
    found = {**reference.clip_l(), name: (248, 768)}
    size = text_encoder_sizes(found)
    assert size.positions == 248
    assert text_tensors(size, "transformers") == found
    assert text_encoder_sizes({**found, name: (100, 768)}).positions == 77


AUTOENCODERS = {
    "SDXL": (SDXL_VAE, (128, 256, 512, 512)),
    "tiny": (Autoencoder((32, 64, 96, 96), 2, 4, 4, 3), (32, 64, 96, 96)),
}


@pytest.mark.parametrize("vae", AUTOENCODERS)
def test_an_autoencoders_tensors(vae: str) -> None:
    size, channels = AUTOENCODERS[vae]
    found = reference.vae(channels)
    assert vae_tensors(size, "diffusers") == found
    original = {
        name: (*shape, 1, 1) if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else shape
        for name, shape in reference.original_vae(found).items()
    }
    assert vae_tensors(size, "original") == original
    for tensors in (found, original):
        assert autoencoder_sizes(tensors) == size


def test_the_attentions_old_names_are_those_that_diffusers_still_reads() -> None:
    """diffusers itself loads a VAE with the old names: ours must be these."""
    with torch.device("meta"):
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=SDXL_VAE.channels,
            layers_per_block=SDXL_VAE.layers,
        )
        old = {name: torch.empty(shape) for name, shape in vae_tensors(SDXL_VAE, "diffusers 0.17").items()}
    assert any(".proj_attn." in name for name in old)
    network._fix_state_dict_keys_on_load(old)
    assert {name: tuple(tensor.shape) for name, tensor in old.items()} == reference.vae()


def test_one_damaged_tensor_does_not_change_the_sizes() -> None:
    """A size is what most tensors say: the message can then name the one that differs."""
    for encoder, build in ENCODERS.values():
        whole = build()
        for name in whole:
            if name != "text_projection.weight":
                for damage in _DAMAGE:
                    assert text_encoder_sizes({**whole, name: damage}) == encoder, name
    for vae, channels in AUTOENCODERS.values():
        whole = reference.vae(channels)
        for name in whole:
            for damage in _DAMAGE:
                assert autoencoder_sizes({**whole, name: damage}) == vae, name


_DAMAGE: tuple[Shape, ...] = ((), (7,), (7, 7, 7), (7, 7, 7, 7))


def test_what_is_unused_is_named_with_its_reason() -> None:
    rows = (*tables.UNUSED_IN_TEXT_ENCODERS, *tables.UNUSED_IN_CLIP_L, *tables.UNUSED_IN_VAES)
    assert all(reason for _, reason in rows)
    assert tables.unused_in_text_encoder("text_projection", "l")
    assert all(tables.unused_in_text_encoder(key, "l") for key in ("input_resolution", "context_length", "vocab_size"))
    assert not tables.unused_in_text_encoder("text_projection", "g")
    assert not tables.unused_in_text_encoder("logit_scale.x", "l")
    assert not tables.unused_in_text_encoder("copy.logit_scale", "l")
    assert tables.unused_in_text_encoder("transformer.text_model.embeddings.position_ids", "g")
    assert not tables.unused_in_vae("encoder.loss.weight")
