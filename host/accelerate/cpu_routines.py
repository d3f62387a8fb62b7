"""Faster routines for U-Nets and VAEs that run on the CPU: for the same arithmetic, and for arithmetic in bf16.

PyTorch uses MKL for fp32 matrix products, which is slower than oneDNN on many processors, above all on those that are
not Intel's. It uses oneDNN for convolutions, which copies the weights into an order of its own every time: where an
image is small and the weights are large, as in KOALA's deepest blocks, the copy takes longer than the convolution, and
a matrix product is faster. The inner activations of a feed-forward layer take so much memory that the system hands it
out anew, page by page, at every call; part of the rows at a time fits into memory that the process has. ComfyUI uses a
memory-saving routine for attention on the CPU, and computes in fp32 even where the processor has units for bf16. The
routines here compute the same faster, in another order of summation. Nothing is switched for the process: they are
exchanged while a MODEL's U-Net or a VAE runs, in its thread, and what depends on the processor is measured first, once
for each shape.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.attention import GEGLU, FeedForward, attention_pytorch
from comfy.patcher_extension import WrappersMP
from torch.nn.functional import conv2d, linear, pad
from torch.overrides import TorchFunctionMode

from ...koala.words import message
from ..protocols import Executor, Model, Vae
from .cpu_kept import keeping, kept
from .exchanged import Part, running
from .plan import BF16, OFF

KEY = "koala_kernels"
MIN_ROWS = 128
"""Products with fewer rows than this (time embeddings) take too little time to matter."""
MIN_SPEEDUP = 1.05
"""Another routine for the same arithmetic is used where it is at least this many times faster on this processor."""
MIN_SPEEDUP_BF16 = 1.5
"""The same for bf16, which is not exact."""
MEASURED_ROWS = MIN_ROWS
"""Rows of the products that are measured: with more of them, how the two compare hardly changes."""
MAX_PIXELS = 512
"""Convolutions with more output pixels than this, over a batch, are never faster as products: there the copy of the
weights matters less, and the one of the image more."""
LARGE, PIECE = 32 * 2**20, 24 * 2**20
"""Bytes of a feed-forward layer's inner activations: beyond ``LARGE``, where glibc asks the system for memory at every
call, they are computed in equal pieces of ``PIECE`` at most. With smaller ones the products get slower: of 8 MiB, in
KOALA's widest layers, by more than is gained (MKL, Intel Xeon)."""
WIDE = 1280
"""Channels of KOALA's deepest blocks, in and out: those of the convolution that is measured."""
MIN_WEIGHTS = 9 * WIDE * WIDE // 2
"""Convolutions with fewer weights than this have too small a copy to save."""


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
    if one_dnn_is_faster():
        return message("products by oneDNN, attention by PyTorch")
    return message("attention by PyTorch")


def install_vae(vae: Vae, routines: str) -> tuple[Vae, str]:
    """A VAE like ``vae`` that convolves in channels_last memory order, with ``BF16`` in bf16; and that in words.

    Where it does not run on the CPU, or with ``OFF``, it is ``vae`` itself, and the text is empty.
    """
    if routines == OFF or vae.device.type != "cpu":
        return vae, ""
    in_bf16 = routines == BF16 and bf16_is_faster()
    faster = copy.copy(vae)  # shares the network; ComfyUI has no other way to clone a VAE
    for name in ("decode", "decode_tiled", "encode", "encode_tiled"):
        setattr(faster, name, _within(Convolutions(torch.bfloat16 if in_bf16 else None), getattr(vae, name)))
    return faster, message("VAE in bf16") if in_bf16 else message("VAE in channels_last")


class OneDnnProducts(TorchFunctionMode):
    """While active, oneDNN computes the fp32 products of layers, and small convolutions with many weights as products,
    where each is faster; everything else is as usual."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (linear, conv2d) and not kwargs and not torch.compiler.is_compiling():
            if function is linear:
                if _is_plain(*args) and one_dnn_is_faster(*args[1].shape[::-1]):
                    return _one_dnn(*args)
            elif (convolution := _Convolution.of(*args)) is not None and convolution.is_faster_as_product():
                return convolution.as_product()
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


class Convolutions(TorchFunctionMode):
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
def one_dnn_is_faster(inputs: int = WIDE, outputs: int = WIDE) -> bool:
    """Whether oneDNN's product with so many features is: measured once for each, in some 10 to 100 ms."""
    if not _has_one_dnn():
        return False
    rows, weight = torch.ones(MEASURED_ROWS, inputs), torch.ones(outputs, inputs)
    return _speedup(lambda: linear(rows, weight), lambda: _one_dnn(rows, weight)) >= MIN_SPEEDUP


@cache
def bf16_is_faster() -> bool:
    """Measured likewise, including the conversion of the weights."""
    rows, weight = torch.ones(512, WIDE), torch.ones(WIDE, WIDE)
    in_bf16 = rows.bfloat16()
    return (
        _speedup(lambda: linear(rows, weight), lambda: linear(in_bf16, weight.bfloat16()), times=5) >= MIN_SPEEDUP_BF16
    )


@cache
def product_convolves_faster(batch: int, height: int, width: int) -> bool:
    """Whether a 3 x 3 convolution of KOALA's deepest blocks, with an output of that size, is faster as a product;
    measured once for each size, in some 100 to 500 ms."""
    x, weight = torch.ones(batch, WIDE, height, width), torch.ones(WIDE, WIDE, 3, 3)
    convolution = _Convolution(x, weight, None, 1)
    return _speedup(lambda: conv2d(x, weight, padding=1), convolution.as_product, times=2) >= MIN_SPEEDUP


def _speedup(usual: Callable[[], Any], other: Callable[[], Any], times: int = 3) -> float:
    """How many times faster the other is: shortest runs, in turns, after one of each that is not counted."""
    taken: dict[Callable[[], Any], list[float]] = {usual: [], other: []}
    for turn in range(1 + times):
        for run, found in taken.items():
            start = time.perf_counter()
            run()
            found += [time.perf_counter() - start] if turn else []
    return min(taken[usual]) / min(taken[other])


def _exactly(executor: Executor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with OneDnnProducts(), feed_forward_in_pieces(executor.class_obj), kept(executor, *args):
        return executor(*args, **kwargs)


def _in_bf16(executor: Executor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with ForeignLayers(), kept(executor, *args):
        return executor(*args, **kwargs)


def _by_pytorch(replaced: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    output: torch.Tensor = attention_pytorch(*args, **kwargs)
    return output


def _within(mode: TorchFunctionMode, method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        with mode:
            return method(*args, **kwargs)

    return run


def _has_one_dnn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _one_dnn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The one way to oneDNN's fp32 product that needs no second, packed copy of the weights. It is PyTorch's own, for
    # its compiler, and has no public name; _has_one_dnn says whether this PyTorch has it.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def _is_plain(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return _are_plain(rows, weight) and rows.numel() >= MIN_ROWS * weight.shape[1]


def _are_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype is weight.dtype is torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.is_contiguous()
    )


def _is_plain_gated(layer: torch.nn.Module) -> bool:
    if type(layer) is not FeedForward:
        return False
    parts: Any = layer.net
    return type(parts[0]) is GEGLU and _keeps_its_weights(parts[0].proj) and _keeps_its_weights(parts[-1])


def _keeps_its_weights(layer: Any) -> bool:
    """Whether the layer computes with its weights as they are, in fp32."""
    weight = layer.weight
    return isinstance(weight, torch.Tensor) and _are_plain(weight, weight) and not getattr(layer, "weight_function", ())


def _in_pieces(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., rows, features]."""
    rows, bytes_of_a_row = x.flatten(0, -2), layer.net[0].proj.out_features * x.element_size()
    if x.dtype is not torch.float32 or len(rows) * bytes_of_a_row <= LARGE:
        whole: torch.Tensor = FeedForward.forward(layer, x)
        return whole
    pieces = rows.chunk(-(-len(rows) // max(1, PIECE // bytes_of_a_row)))
    return torch.cat([FeedForward.forward(layer, piece) for piece in pieces]).view(*x.shape[:-1], -1)


class _Convolution(NamedTuple):
    """A 3 x 3 convolution with one pixel of zeros around its image.

    ``x`` [batch, channels in, height, width], ``weight`` [channels out, channels in, 3, 3].
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: int

    @classmethod
    def of(
        cls, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *settings: Any
    ) -> _Convolution | None:
        """The one that a call of ``conv2d`` computes, if it is such a one, with many weights and few pixels."""
        if len(settings) != 4 or weight.shape[2:] != (3, 3) or weight.numel() < MIN_WEIGHTS or x.dim() != 4:
            return None
        stride, padding, dilation, groups = settings
        is_usual = stride in ((1, 1), (2, 2)) and padding == dilation == (1, 1) and groups == 1
        if (
            not is_usual
            or not _are_plain(x, weight)
            or x.shape[0] * x.shape[2] * x.shape[3] > MAX_PIXELS * stride[0] ** 2
        ):
            return None
        return cls(x, weight, bias, stride[0])

    def is_faster_as_product(self) -> bool:
        batch, _, *sides = self.x.shape
        return _has_one_dnn() and product_convolves_faster(batch, *(-(-side // self.stride) for side in sides))

    def as_product(self) -> torch.Tensor:
        """[batch, channels out, height, width]: each output pixel's neighbourhood is a row, the weights are as they
        lie in memory, without a copy."""
        around = pad(self.x, (1, 1, 1, 1)).unfold(2, 3, self.stride).unfold(3, 3, self.stride)
        batch, _, height, width = around.shape[:4]
        rows = around.permute(0, 2, 3, 1, 4, 5).reshape(batch * height * width, -1)
        made = _one_dnn(rows, self.weight.flatten(1), self.bias)
        return made.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
