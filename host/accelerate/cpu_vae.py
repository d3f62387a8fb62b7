"""A VAE that decodes and encodes faster on the CPU: large images by Winograd's algorithm, its residual blocks computed
strip by strip; where that is not faster, in channels_last memory order; in bf16 where that is much faster than either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock, normal_attention, pytorch_attention
from torch.nn.functional import conv2d
from torch.overrides import TorchFunctionMode

from ...koala.words import message
from ..protocols import Vae
from .cpu_convolutions import Convolution, winograd_is_faster_for_large_images
from .cpu_products import speedup
from .cpu_routines import MIN_SPEEDUP_BF16, FasterLayers, keeps_its_weights
from .cpu_winograd import Activation, Memory, convolve
from .exchanged import Part, running, with_methods
from .plan import BF16, OFF


def install(vae: Vae, routines: str) -> tuple[Vae, str]:
    """A VAE like ``vae`` that runs faster on the CPU, and how, in words.

    Where it does not run there, or with ``OFF``, it is ``vae`` itself, and the text is empty.
    """
    if routines == OFF or vae.device.type != "cpu":
        return vae, ""
    mode: TorchFunctionMode
    if routines == BF16 and bf16_convolves_faster():
        mode, words = ChannelsLast(torch.bfloat16), message("VAE in bf16")
    elif vae.vae_dtype is torch.float32 and winograd_is_faster_for_large_images():
        mode, words = FasterLayers(), message("VAE by NNPACK")
    else:
        mode, words = ChannelsLast(None), message("VAE in channels_last")

    def run(network: torch.nn.Module, method: Callable[..., torch.Tensor], *given: Any, **options: Any) -> torch.Tensor:
        blocks = in_strips(network) if isinstance(mode, FasterLayers) else nullcontext()
        with mode, attention_by_pytorch(network), blocks:
            return method(*given, **options)

    return with_methods(vae, run), words


def in_strips(network: torch.nn.Module) -> AbstractContextManager[None]:
    """While active, a VAE's residual blocks activate and convolve large images strip by strip, in memory that all of
    them share. Blocks that another node has changed stay, and all of them where gradients are computed."""
    memory = Memory()
    blocks = [] if torch.is_grad_enabled() else [block for block in network.modules() if _is_plain(block)]
    return running([Part(block, partial(_residual, block, memory)) for block in blocks])


@contextmanager
def attention_by_pytorch(vae: torch.nn.Module) -> Iterator[None]:
    """While active, a VAE's attention is PyTorch's, which never holds the whole matrix of all pixels by all pixels, as
    ComfyUI's for the CPU does: 1 GB of it for 1024 x 1024 pixels. Another routine that was chosen stays."""
    blocks = [
        block for block in vae.modules() if type(block) is AttnBlock and block.optimized_attention is normal_attention
    ]
    try:
        for block in blocks:
            block.optimized_attention = pytorch_attention
        yield
    finally:
        for block in blocks:
            block.optimized_attention = normal_attention


class ChannelsLast(TorchFunctionMode):
    """While active, convolutions run in channels_last memory order and in ``dtype`` (None: their own); what is between
    them keeps its type."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not conv2d or kwargs:
            return function(*args, **(kwargs or {}))
        x, weight, bias, *rest = args
        dtype = self.dtype or x.dtype
        ordered = [tensor.to(dtype, memory_format=torch.channels_last) for tensor in (x, weight)]
        return conv2d(*ordered, None if bias is None else bias.to(dtype), *rest).to(x.dtype)


@cache
def bf16_convolves_faster() -> bool:
    """Whether a VAE's convolutions are, beside the fastest routine in fp32: measured once, in some 500 ms."""
    x, weight = torch.ones(1, 512, 64, 64), torch.ones(512, 512, 3, 3)

    def with_mode(mode: TorchFunctionMode) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with mode:
                return conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1)

        return run

    exactly = FasterLayers() if winograd_is_faster_for_large_images() else ChannelsLast(None)
    return speedup(with_mode(exactly), with_mode(ChannelsLast(torch.bfloat16))) >= MIN_SPEEDUP_BF16


def _is_plain(block: torch.nn.Module) -> bool:
    """Whether a module is the host's residual block, as it has made it."""
    if type(block) is not ResnetBlock or block.training:
        return False
    norms, convolutions = (block.norm1, block.norm2), (block.conv1, block.conv2)
    return (
        all(isinstance(norm, torch.nn.GroupNorm) for norm in norms)
        and all(isinstance(layer, torch.nn.Conv2d) and layer.padding_mode == "zeros" for layer in convolutions)
        and all(keeps_its_weights(layer) for layer in (*norms, *convolutions))
        and not any(
            part._forward_hooks or part._forward_pre_hooks or {"forward", "_conv_forward"} & vars(part).keys()
            for part in block.modules()
        )
    )


def _residual(block: Any, memory: Memory, x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
    """``ResnetBlock.forward``; ``others``: a time embedding and what a video's frames leave for the next, here None."""
    if options or any(other is not None for other in others):
        usual: torch.Tensor = ResnetBlock.forward(block, x, *others, **options)
        return usual
    inner = _activated(block.norm1, block.conv1, x, memory, purpose="inner")
    if block.in_channels == block.out_channels:
        return _activated(block.norm2, block.conv2, inner, memory, added=x)
    shortcut = (block.conv_shortcut if block.use_conv_shortcut else block.nin_shortcut)(x)
    return _activated(block.norm2, block.conv2, inner, memory, added=shortcut, out=shortcut)


def _activated(
    norm: Any,
    layer: Any,
    x: torch.Tensor,
    memory: Memory,
    added: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    purpose: str = "",
) -> torch.Tensor:
    """Norm, SiLU and convolution of an image, and what is added. ``purpose``: of the memory in which the result is."""
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    convolution = Convolution.of(x, layer.weight, layer.bias, *settings)
    activation = Activation.of(norm, x) if convolution is not None and convolution.is_for_winograd() else None
    if activation is None:
        made: torch.Tensor = layer(torch.nn.functional.silu(norm(x), inplace=True))
        return made if added is None else made.add_(added)
    if purpose:
        out = memory.take(purpose, len(x), len(layer.weight), *x.shape[2:])
    return convolve(x, layer.weight, layer.bias, activation, added, out, memory)
