"""Faster routines for U-Nets and VAEs that run on the CPU: for the same arithmetic, and for arithmetic in bf16.

PyTorch uses MKL for fp32 matrix products, which reaches half the speed on processors that are not Intel's; ComfyUI uses
a memory-saving routine for attention on the CPU, and computes in fp32 even where the processor has units for bf16.
oneDNN, which PyTorch uses for convolutions, and PyTorch's own attention compute the same faster, in another order.
Nothing is switched for the process: the routines are exchanged while a MODEL's U-Net or a VAE runs, in its thread, and
what depends on the processor is measured first.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from torch.nn.functional import conv2d, linear
from torch.overrides import TorchFunctionMode

from ..protocols import Executor, Model, Vae
from .plan import BF16, OFF

KEY = "koala_kernels"
MIN_ROWS = 128
"""Products with fewer rows than this (time embeddings) take too little time to matter."""
MIN_SPEEDUP = 1.2
"""oneDNN is used where it is at least this many times faster on this processor."""
MIN_SPEEDUP_BF16 = 1.5
"""The same for bf16, which is not exact."""


def install(model: Model, routines: str) -> str:
    """Let a MODEL (a clone) use faster routines if it runs on the CPU; returns which in words, empty for none.

    An attention routine that another node has chosen for the MODEL stays.
    """
    if routines == OFF or model.load_device.type != "cpu":
        return ""
    model.model_options["transformer_options"].setdefault("optimized_attention_override", _by_pytorch)
    if routines == BF16 and bf16_is_faster():
        model.set_model_compute_dtype(torch.bfloat16)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _with_foreign_layers)
        return "U-Net in bf16"
    if one_dnn_is_faster():
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _by_one_dnn)
        return "products by oneDNN, attention by PyTorch"
    return "attention by PyTorch"


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
    return faster, "VAE in bf16" if in_bf16 else "VAE in channels_last"


class OneDnnProducts(TorchFunctionMode):
    """While active, oneDNN computes the fp32 products of layers; everything else is as usual."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is linear and not kwargs and _is_plain(*args):
            return _one_dnn(*args)
        return function(*args, **(kwargs or {}))


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
def one_dnn_is_faster() -> bool:
    """Measured once, in some 50 ms, on a product of KOALA's deepest layers at 512 px."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    rows, weight = _product()
    return _seconds(lambda: linear(rows, weight)) > MIN_SPEEDUP * _seconds(lambda: _one_dnn(rows, weight))


@cache
def bf16_is_faster() -> bool:
    """Measured likewise, including the conversion of the weights."""
    rows, weight = _product()
    in_bf16 = rows.bfloat16()
    return _seconds(lambda: linear(rows, weight)) > MIN_SPEEDUP_BF16 * _seconds(
        lambda: linear(in_bf16, weight.bfloat16())
    )


def _product() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(512, 1280, generator=generator), torch.randn(1280, 1280, generator=generator)


def _seconds(run: Callable[[], Any], times: int = 5) -> float:
    """The shortest of several runs, after one that is not counted."""
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _by_one_dnn(executor: Executor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with OneDnnProducts():
        return executor(*args, **kwargs)


def _with_foreign_layers(executor: Executor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with ForeignLayers():
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


def _one_dnn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The one way to oneDNN's fp32 product that needs no second, packed copy of the weights. It is PyTorch's own, for
    # its compiler, and has no public name; where a PyTorch lacks it, one_dnn_is_faster returns False.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def _is_plain(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return (
        rows.dtype is weight.dtype is torch.float32
        and rows.device.type == weight.device.type == "cpu"
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.is_contiguous()
        and rows.numel() >= MIN_ROWS * weight.shape[1]
    )
