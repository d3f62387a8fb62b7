"""What of a U-Net and of a VAE is compiled by ``torch.compile``: transformer blocks, and norms with their activation.

Blocks of the same structure share their compiled code: KOALA's 21 or 30 transformer blocks have two structures, and all
norms have one. So a network is compiled as fast as these three; what lies between, convolutions above all, is best
left to the libraries. Weights are inputs of the compiled code, so that a LoRA needs no new one, and so are the sizes of
images, batches and prompts, but for a batch of one, which PyTorch always compiles apart. PyTorch keeps compiled code on
disk.

The modules are the host's own; only their ``forward`` is another one while they run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from types import FunctionType
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, ResnetBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch.nn.functional import group_norm, scaled_dot_product_attention, silu

from .exchanged import Part

ATTENTION = "optimized_attention_override"
"""The transformer option by which a node chooses the routine that computes attention."""
EXACT_ATTENTION = frozenset(f"attention_{name}" for name in ("basic", "pytorch", "split", "sub_quad", "xformers"))
"""The host's routines that compute the same as PyTorch's, which compiled blocks use."""


def parts(network: torch.nn.Module) -> list[Part]:
    """The parts of a network (a ``UNetModel``, or a VAE's) that are compiled, once they first run.

    A VAE's also run in channels_last memory order, in which a GPU's convolutions are faster. A U-Net's do not: between
    its convolutions and its transformer blocks every tensor would be copied.
    """
    return [part for module in network.modules() for part in _parts_of(module)]


def is_transformer(part: Part) -> bool:
    """Whether it computes attention: its compiled code knows no patches, which act within it."""
    return isinstance(part.module, BasicTransformerBlock)


def attention_is_exact() -> bool:
    """Whether the host's own choice, by its command line, is one of ``EXACT_ATTENTION``."""
    return attention.optimized_attention.__name__ in EXACT_ATTENTION


def _parts_of(module: Any) -> Iterator[Part]:
    if type(module) is BasicTransformerBlock:
        structure = tuple((name, tuple(weight.shape), weight.dtype) for name, weight in module.named_parameters())
        yield Part(module, partial(_transformer_block, _compiled(_transformer, structure), module))
    elif type(module) is ResBlock and not module.use_scale_shift_norm:
        for layers in (module.in_layers, module.out_layers):
            yield from _norm_and_activation(layers[0], layers[1])
    elif type(module) is ResnetBlock:  # of a VAE: one activation for both norms
        yield from _norm_and_activation(module.norm1, module.swish, order=torch.channels_last)
        yield from _norm_and_activation(module.norm2, order=torch.channels_last)
    elif type(module) is AttnBlock:
        yield Part(module.norm, partial(_norm, _compiled(_plain_norm), module.norm, torch.channels_last))
    elif type(module) in (Encoder, Decoder):
        yield Part(module.norm_out, partial(_norm, _compiled(_plain_norm), module.norm_out, torch.channels_last))
        yield Part(module.conv_in, partial(_in_channels_last, module.conv_in))


def _norm_and_activation(
    norm: torch.nn.GroupNorm, *activation: torch.nn.Module, order: torch.memory_format = torch.preserve_format
) -> Iterator[Part]:
    """A norm that computes its activation as well, and the activation, which then does nothing."""
    yield Part(norm, partial(_norm, _compiled(_activated_norm, (order,)), norm, order))
    for module in activation:
        yield Part(module, _unchanged)


def _in_channels_last(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = type(module).forward(module, x.contiguous(memory_format=torch.channels_last))
    return output


def _transformer_block(
    compiled: Callable[..., torch.Tensor],
    block: BasicTransformerBlock,
    x: torch.Tensor,
    context: torch.Tensor | None = None,
    transformer_options: object = None,
) -> torch.Tensor:
    """``x``: [batch, pixels, width]; ``context``: [batch, tokens, width]. The options that matter to this block are
    patches, with which its compiled code is not used."""
    _of_any_size(x, 0, 1)
    if context is not None:
        _of_any_size(context, 0, 1)
    return compiled(block, x, context)


def _norm(
    compiled: Callable[..., torch.Tensor], norm: torch.nn.GroupNorm, order: torch.memory_format, x: torch.Tensor
) -> torch.Tensor:
    """``x``: [batch, channels, height, width], in whichever memory order if ``order`` is preserve_format."""
    if order is not torch.preserve_format:
        x = x.contiguous(memory_format=order)
    # the host's way to a layer's weights, wherever and of whichever type they are
    weight, bias, streamed = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    weights = weight.detach(), bias.detach()  # PyTorch compiles anew for each shape of a parameter
    _of_any_size(x, 0, 1, 2, 3)
    for tensor in weights:
        _of_any_size(tensor, 0)
    output = compiled(x, order, norm.num_groups, *weights, norm.eps)
    comfy.ops.uncast_bias_weight(norm, weight, bias, streamed)
    return output


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _transformer(block: BasicTransformerBlock, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = type(block).forward(block, x, context, {ATTENTION: _attention})
    return output


def _attention(
    replaced: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **_: object
) -> torch.Tensor:
    """PyTorch's attention, of [batch, pixels or tokens, width] each, instead of ``replaced``. ComfyUI calls the same on
    a GPU, within a context that orders PyTorch's routines: compiled code with it is not kept on disk, and PyTorch 2.7
    cannot compile it."""
    apart = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
    return scaled_dot_product_attention(*apart).transpose(1, 2).flatten(-2)


def _activated_norm(x: torch.Tensor, order: torch.memory_format, *further: Any) -> torch.Tensor:
    return _in_order(silu(group_norm(x, *further)), order)


def _plain_norm(x: torch.Tensor, order: torch.memory_format, *further: Any) -> torch.Tensor:
    return _in_order(group_norm(x, *further), order)


def _in_order(x: torch.Tensor, order: torch.memory_format) -> torch.Tensor:
    """On a GPU, compiled norms make contiguous tensors by themselves."""
    return x if order is torch.preserve_format else x.contiguous(memory_format=order)


@cache
def _compiled(function: Any, structure: tuple[Any, ...] = ()) -> Callable[..., torch.Tensor]:
    """The code for all modules of a structure.

    PyTorch counts the variants of one code object and compiles no more than eight; so each structure has its own. What
    it cannot compile as one graph is an error: in pieces it would compile each of them for every block and size.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__)
    compiled: Callable[..., torch.Tensor] = torch.compile(own, fullgraph=True)
    return compiled


def _of_any_size(tensor: torch.Tensor, *dimensions: int) -> None:
    """Compile for any size of these dimensions. Without it PyTorch takes sizes that happen to be equal, as the height
    and the width of a square, for one, and compiles anew for another image format."""
    torch._dynamo.maybe_mark_dynamic(tensor, list(dimensions))
