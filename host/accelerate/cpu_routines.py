"""Faster routines for U-Nets that run on the CPU: for the same arithmetic, and for arithmetic in bf16.

Matrix products and 3 x 3 convolutions are computed by the routine that is fastest on this processor. The inner
activations of a feed-forward layer take so much memory that the system hands it out anew, page by page, at every call;
part of the rows at a time fits into memory that the process has. ComfyUI uses a memory-saving routine for attention on
the CPU, and computes in fp32 even where the processor has units for bf16. The routines here compute the same faster, in
another order of summation. Nothing is switched for the process: they are exchanged while a MODEL's U-Net runs, in its
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from comfy.ldm.modules.attention import GEGLU, FeedForward, attention_pytorch
from comfy.patcher_extension import WrappersMP
from torch.nn.functional import conv2d, linear
from torch.overrides import TorchFunctionMode

from ...koala.words import joined, message
from ..protocols import Executor, Model
from .cpu_convolutions import Convolution, winograd_is_faster_for_large_images
from .cpu_kept import keeping, kept
from .cpu_products import WIDE, are_plain, by_one_dnn, is_plain_product, one_dnn_is_faster, speedup
from .exchanged import Part, running
from .plan import BF16, OFF

KEY = "koala_kernels"
MIN_SPEEDUP_BF16 = 1.5
"""bf16, which is not exact, is used where it is at least this many times faster on this processor."""
LARGE, PIECE = 32 * 2**20, 24 * 2**20
"""Bytes of a feed-forward layer's inner activations: beyond ``LARGE``, where glibc asks the system for memory at every
call, they are computed in equal pieces of ``PIECE`` at most. With smaller ones the products get slower: of 8 MiB, in
KOALA's widest layers, by more than is gained (MKL, Intel Xeon)."""


def install(model: Model, routines: str) -> str:
    """Let a MODEL (a clone) use faster routines if it runs on the CPU; returns which in words, empty for none.

    An attention routine that another node has chosen for the MODEL stays.
    """
    if routines == OFF or model.load_device.type != "cpu":
        return ""
    model.model_options["transformer_options"].setdefault("optimized_attention_override", _by_pytorch)
    in_bf16 = routines == BF16 and bf16_is_faster()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, keeping(torch.bfloat16 if in_bf16 else None))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _in_bf16 if in_bf16 else _exactly)
    if in_bf16:
        model.set_model_compute_dtype(torch.bfloat16)
        return message("U-Net in bf16")
    words = [message("products by oneDNN")] if one_dnn_is_faster() else []
    words += [message("convolutions by NNPACK")] if winograd_is_faster_for_large_images() else []
    return joined(", ", [*words, message("attention by PyTorch")])


class FasterLayers(TorchFunctionMode):
    """While active, the fp32 products and 3 x 3 convolutions of layers are computed by the routine that is fastest on
    this processor; everything else is as usual."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (linear, conv2d) and not kwargs and not torch.compiler.is_compiling():
            if function is linear:
                if is_plain_product(*args) and one_dnn_is_faster(*args[1].shape[::-1]):
                    return by_one_dnn(*args)
            elif (convolution := Convolution.of(*args)) is not None and (way := convolution.faster_way()) is not None:
                return way()
        return function(*args, **(kwargs or {}))


def feed_forward_in_pieces(unet: torch.nn.Module) -> AbstractContextManager[None]:
    """While active, the feed-forward layers of a U-Net compute large inputs a piece of their rows after the other: each
    row as before, bit for bit. Layers that another node has changed stay, as do those that convert their weights at
    every call, and all of a U-Net that is compiled."""
    layers = [] if torch.compiler.is_compiling() else [layer for layer in unet.modules() if _is_plain_gated(layer)]
    return running([Part(layer, partial(_in_pieces, layer)) for layer in layers])


class ForeignLayers(TorchFunctionMode):
    """While active, layers whose weights have another type than their input compute in theirs and give their input's.

    ComfyUI's layers convert their weights themselves. Those that a patch brings, as a hypernetwork's, do not, and were
    made for the type in which the U-Net computes without KOALA Accelerate.
    """

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in (linear, conv2d) or len(args) < 2 or args[0].dtype is args[1].dtype:
            return function(*args, **(kwargs or {}))
        rows, weight, *rest = args
        return function(rows.to(weight.dtype), weight, *rest, **(kwargs or {})).to(rows.dtype)


@cache
def bf16_is_faster() -> bool:
    """Measured likewise, including the conversion of the weights."""
    rows, weight = torch.ones(512, WIDE), torch.ones(WIDE, WIDE)
    in_bf16 = rows.bfloat16()
    return (
        speedup(lambda: linear(rows, weight), lambda: linear(in_bf16, weight.bfloat16()), times=5) >= MIN_SPEEDUP_BF16
    )


def _exactly(executor: Executor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with FasterLayers(), feed_forward_in_pieces(executor.class_obj), kept(executor, *args):
        return executor(*args, **kwargs)


def _in_bf16(executor: Executor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with ForeignLayers(), kept(executor, *args):
        return executor(*args, **kwargs)


def _by_pytorch(replaced: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    """PyTorch's attention in place of ``replaced``, ComfyUI's choice: an ``optimized_attention_override``."""
    output: torch.Tensor = attention_pytorch(*args, **kwargs)
    return output


def _is_plain_gated(layer: torch.nn.Module) -> bool:
    if type(layer) is not FeedForward:
        return False
    parts: Any = layer.net
    return type(parts[0]) is GEGLU and keeps_its_weights(parts[0].proj) and keeps_its_weights(parts[-1])


def keeps_its_weights(layer: Any) -> bool:
    """Whether the layer computes with its weights as they are, in fp32."""
    weight = layer.weight
    return isinstance(weight, torch.Tensor) and are_plain(weight, weight) and not getattr(layer, "weight_function", ())


def _in_pieces(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., rows, features]."""
    rows, bytes_of_a_row = x.flatten(0, -2), layer.net[0].proj.out_features * x.element_size()
    if x.dtype is not torch.float32 or len(rows) * bytes_of_a_row <= LARGE:
        whole: torch.Tensor = FeedForward.forward(layer, x)
        return whole
    pieces = rows.chunk(-(-len(rows) // max(1, PIECE // bytes_of_a_row)))
    return torch.cat([FeedForward.forward(layer, piece) for piece in pieces]).view(*x.shape[:-1], -1)
