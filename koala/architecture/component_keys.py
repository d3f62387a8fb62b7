"""Tensor names and shapes of text encoders and autoencoder, derived from their sizes, under every naming in files.

What ``keys`` is for the U-Net. Sources: transformers' ``CLIPTextModelWithProjection``, open_clip's ``TextTransformer``,
diffusers' ``AutoencoderKL`` and the original autoencoder; the renaming reproduces diffusers' conversion scripts and
ComfyUI's ``diffusers_convert``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from .components import TEXT_LAYER_MODULES, Autoencoder, TextEncoder, TextKind
from .keys import Shape

VOCABULARY = 49408
"""Words of CLIP's tokenizer; ComfyUI builds no other."""

# --- text encoders -----------------------------------------------------------------------------------------------

TextNaming = Literal["transformers", "transformers 5", "open_clip"]
"""``transformers``: version 4, with ``text_model.`` in front. ``transformers 5``: without. ``open_clip``: query, key
and value of a layer are one tensor; CLIP-G in single-file checkpoints has these names, and OpenAI's own files."""

OPEN_CLIP_NAMES = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""transformers' name -> open_clip's; query, key and value are joined besides."""
QUERY_KEY_VALUE = re.compile(r"^(.+\.self_attn)\.([qkv])_proj\.(weight|bias)$")
PROJECTION = "text_projection.weight"
TRANSPOSED_PROJECTION = "text_projection"
"""The projection as a bare parameter, transposed: in open_clip, and in files of ComfyUI's first years."""

UNUSED_IN_TEXT_ENCODERS: tuple[tuple[str, str], ...] = (
    (r"(.+\.)?embeddings\.position_ids", "the numbers of the positions, which transformers saved before 4.31"),
    (r"logit_scale", "CLIP's temperature, which compares texts with images"),
    (r"attn_mask", "open_clip's causal mask, a constant"),
    (r"input_resolution|context_length|vocab_size", "sizes that OpenAI's own files hold as numbers"),
    (r"(vision_model|visual_projection|visual)\..+", "the image encoder of a whole CLIP, transformers' or open_clip's"),
)
"""Names, as patterns, of tensors that a text encoder's file may hold besides its own -> what they are."""
UNUSED_IN_CLIP_L: tuple[tuple[str, str], ...] = (
    (
        r"text_projection(\.weight)?",
        "its projection, beside the network in ComfyUI's first checkpoints; SDXL has no use for it",
    ),
)
"""The same for CLIP-L alone."""


def text_name(name: str) -> str:
    """A text encoder tensor's name as transformers 4 writes it, whichever version wrote the file."""
    if name.startswith(("text_model.", "text_projection", "logit_scale")):
        return name
    return f"text_model.{name}"


def open_clip_name(name: str) -> str:
    """A text encoder tensor's name in open_clip from its name in transformers 4; not for query, key and value."""
    for transformers, open_clip in OPEN_CLIP_NAMES:
        name = name.replace(transformers, open_clip)
    return name


def text_naming(found: Iterable[str]) -> TextNaming:
    """The naming that a text encoder's tensors have, by the names of its layers."""
    names = tuple(found)
    if any(name.startswith("text_model.") for name in names):
        return "transformers"
    return "open_clip" if any(name.startswith("transformer.resblocks.") for name in names) else "transformers 5"


def projection_name(found: Iterable[str]) -> str:
    """The name that the projection has, or would have, among these tensors."""
    names = set(found)
    raw = TRANSPOSED_PROJECTION in names or text_naming(names) == "open_clip"
    return TRANSPOSED_PROJECTION if raw and PROJECTION not in names else PROJECTION


def text_tensors(size: TextEncoder, naming: TextNaming, projection: str = PROJECTION) -> dict[str, Shape]:
    """Every tensor of a text encoder, name -> shape; ``projection``: the name that it has, where there is one."""
    found = dict(_text_tensors(size))
    if naming == "transformers 5":
        found = {name.removeprefix("text_model."): shape for name, shape in found.items()}
    elif naming == "open_clip":
        found = dict(_joined(found))
    if size.projection:
        found[projection] = (size.projection, size.hidden)
    return found


def _text_tensors(size: TextEncoder) -> Iterator[tuple[str, Shape]]:
    width, inner = size.hidden, size.intermediate
    others: dict[str, Shape] = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    yield "text_model.embeddings.token_embedding.weight", (VOCABULARY, width)
    yield "text_model.embeddings.position_embedding.weight", (size.positions, width)
    for index in range(size.layers):
        for module in TEXT_LAYER_MODULES:
            matrix = others.get(module, (width, width))
            shape = (width,) if module.startswith("layer_norm") else matrix
            yield from _weights(f"text_model.encoder.layers.{index}.{module}", shape)
    yield from _weights("text_model.final_layer_norm", (width,))


def _joined(tensors: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Under open_clip's names: a layer's query, key and value are one tensor."""
    for name, shape in tensors.items():
        attention = QUERY_KEY_VALUE.match(name)
        if attention is None:
            yield open_clip_name(name), shape
        elif attention[2] == "q":
            yield open_clip_name(f"{attention[1]}.in_proj_{attention[3]}"), (3 * shape[0], *shape[1:])


def unused_in_text_encoder(name: str, kind: TextKind) -> bool:
    """Whether a file may hold this tensor besides the encoder's own."""
    return _is_listed(name, (*UNUSED_IN_TEXT_ENCODERS, *(UNUSED_IN_CLIP_L if kind == "l" else ())))


def _is_listed(name: str, table: Iterable[tuple[str, str]]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern, _ in table)


# --- autoencoder -------------------------------------------------------------------------------------------------

VAENaming = Literal["diffusers", "diffusers 0.17", "original"]
"""``diffusers 0.17``: diffusers' names with the attention's old ones. ``original``: as single-file checkpoints."""

VAE_NAMES = (
    ("encoder.down.{stage}.block.", "encoder.down_blocks.{stage}.resnets."),
    ("encoder.down.{stage}.downsample.", "encoder.down_blocks.{stage}.downsamplers.0."),
    ("decoder.up.{stage}.block.", "decoder.up_blocks.{stage}.resnets."),
    ("decoder.up.{stage}.upsample.", "decoder.up_blocks.{stage}.upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
)
"""Original name -> diffusers'. diffusers counts the decoder's stages from its beginning, the original from its end."""
OLD_ATTENTION_NAMES = (
    (".attentions.0.to_q.", ".attentions.0.query."),
    (".attentions.0.to_k.", ".attentions.0.key."),
    (".attentions.0.to_v.", ".attentions.0.value."),
    (".attentions.0.to_out.0.", ".attentions.0.proj_attn."),
)
"""diffusers' name -> its name until version 0.17."""
VAE_MATRICES = re.compile(
    r"(\.mid\.attn_1\.(q|k|v|proj_out)"
    r"|\.mid_block\.attentions\.0\.(to_(q|k|v|out\.0)|query|key|value|proj_attn))\.weight$"
)
"""The middle attention: convolutions of (width, width, 1, 1) under original names, (width, width) under diffusers'."""

UNUSED_IN_VAES: tuple[tuple[str, str], ...] = (
    (r"loss\..+", "the discriminator and perceptual loss that it was trained with"),
    (r"model_ema\..+", "moving averages of its weights, and their counters"),
)
"""Names, as patterns, of tensors that a VAE's file may hold besides its own -> what they are."""


def vae_naming(found: Iterable[str]) -> VAENaming:
    """The naming that an autoencoder's tensors have, by the names of its stages and of its attention."""
    names = tuple(found)
    if not any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names):
        return "original"
    return "diffusers 0.17" if any(".attentions.0.proj_attn." in name for name in names) else "diffusers"


def vae_tensors(size: Autoencoder, naming: VAENaming) -> dict[str, Shape]:
    """Every tensor of an autoencoder, name -> shape."""
    found = dict(_vae_tensors(size))
    if naming == "diffusers 0.17":
        return {old_vae_name(name): shape for name, shape in found.items()}
    if naming == "original":
        return {
            original_vae_name(name, len(size.channels)): (*shape, 1, 1) if VAE_MATRICES.search(name) else shape
            for name, shape in found.items()
        }
    return found


def _vae_tensors(size: Autoencoder) -> Iterator[tuple[str, Shape]]:
    first, last, final = size.channels[0], size.channels[-1], len(size.channels) - 1
    yield from _weights("encoder.conv_in", (first, size.image_channels, 3, 3))
    width = first
    for stage, channels in enumerate(size.channels):
        for layer in range(size.layers):
            yield from _resnet(f"encoder.down_blocks.{stage}.resnets.{layer}", width, channels)
            width = channels
        if stage < final:
            yield from _weights(f"encoder.down_blocks.{stage}.downsamplers.0.conv", (width, width, 3, 3))
    yield from _middle("encoder.mid_block", last)
    yield from _weights("encoder.conv_norm_out", (last,))
    yield from _weights("encoder.conv_out", (2 * size.latent_channels, last, 3, 3))
    yield from _weights("decoder.conv_in", (last, size.latent_channels, 3, 3))
    yield from _middle("decoder.mid_block", last)
    width = last
    for stage, channels in enumerate(reversed(size.channels)):
        for layer in range(size.layers + 1):
            yield from _resnet(f"decoder.up_blocks.{stage}.resnets.{layer}", width, channels)
            width = channels
        if stage < final:
            yield from _weights(f"decoder.up_blocks.{stage}.upsamplers.0.conv", (width, width, 3, 3))
    yield from _weights("decoder.conv_norm_out", (first,))
    yield from _weights("decoder.conv_out", (size.image_channels, first, 3, 3))
    yield from _weights("quant_conv", (2 * size.embed, 2 * size.latent_channels, 1, 1))
    yield from _weights("post_quant_conv", (size.latent_channels, size.embed, 1, 1))


def _resnet(module: str, c_in: int, c_out: int) -> Iterator[tuple[str, Shape]]:
    yield from _weights(f"{module}.norm1", (c_in,))
    yield from _weights(f"{module}.conv1", (c_out, c_in, 3, 3))
    yield from _weights(f"{module}.norm2", (c_out,))
    yield from _weights(f"{module}.conv2", (c_out, c_out, 3, 3))
    if c_in != c_out:
        yield from _weights(f"{module}.conv_shortcut", (c_out, c_in, 1, 1))


def _middle(module: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _resnet(f"{module}.resnets.0", width, width)
    yield from _weights(f"{module}.attentions.0.group_norm", (width,))
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _weights(f"{module}.attentions.0.{projection}", (width, width))
    yield from _resnet(f"{module}.resnets.1", width, width)


def unused_in_vae(name: str) -> bool:
    """Whether a file may hold this tensor besides the autoencoder's own."""
    return _is_listed(name, UNUSED_IN_VAES)


def vae_name(original: str, stages: int) -> str:
    """An autoencoder tensor's diffusers name from its original one; ``stages``: how many its decoder has."""
    return _renamed(original, VAE_NAMES, stages)


def original_vae_name(diffusers: str, stages: int) -> str:
    """An autoencoder tensor's original name from its diffusers one, old or new."""
    for new, old in OLD_ATTENTION_NAMES:
        diffusers = diffusers.replace(old, new)
    return _renamed(diffusers, [(source, target) for target, source in VAE_NAMES], stages)


def old_vae_name(diffusers: str) -> str:
    """The name that diffusers gave an autoencoder's tensor until version 0.17."""
    for new, old in OLD_ATTENTION_NAMES:
        diffusers = diffusers.replace(new, old)
    return diffusers


def _renamed(name: str, table: Iterable[tuple[str, str]], stages: int) -> str:
    for source, target in table:
        pattern = re.escape(source).replace(r"\{stage\}", r"(?P<stage>\d+)")
        if found := re.search(pattern, name):
            stage = int(found["stage"]) if "{stage}" in source else 0
            stage = stages - 1 - stage if source.startswith("decoder.") else stage
            name = name[: found.start()] + target.format(stage=stage) + name[found.end() :]
    return name


def _weights(module: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{module}.weight", shape
    yield f"{module}.bias", shape[:1]
