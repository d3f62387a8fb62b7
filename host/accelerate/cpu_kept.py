"""What a run on the CPU computes once and keeps until it ends: nothing in it changes from step to step.

The prompt stays the same, and with it the keys and values that cross attention makes of it. A U-Net that computes in
bf16, while its weights have another type, converts them all at every step, in a fifth to a third of the time; as far as
memory is free, they are kept as they were converted. Both give the same numbers, bit for bit.

Within a run only hooks change weights, as for LoRAs scheduled over the steps: passes with them keep and use nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management as management
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.model_patcher import create_model_options_clone
from comfy.ops import CastWeightBiasOp

from ..protocols import Executor, Guider, Model
from .branches import Call
from .strategy import GIB, pass_memory

KEY = "koala_kept"
MOST_TEXT = 2**28
"""Bytes that the keys and values of a run's texts take at most: of some nine texts of KOALA-700M, prompt and negative
prompt together, in fp32."""

LINE = 64
"""Numbers: a cache line or two, at which libraries like matrices to begin."""


class _Swap(NamedTuple):
    """An attribute of a layer's own, ``name`` in ``place``, that hides its method or its parameter of that name."""

    place: dict[str, Any]
    name: str
    value: Any


class Kept:
    """What one run keeps. ``dtype``: the type in which its weights are kept; None: as they are."""

    def __init__(self, model: Model, dtype: torch.dtype | None) -> None:
        self._model, self._dtype = model, dtype
        self._texts: list[tuple[torch.Tensor, dict[torch.nn.Module, torch.Tensor]]] = []
        self._weights: list[_Swap] | None = None

    @contextmanager
    def used(self, unet: torch.nn.Module, call: Call) -> Iterator[None]:
        """While active, the U-Net's layers use what is kept, and keep what is missing. Layers that another node has
        changed stay."""
        if self._model.current_hooks is not None:
            yield
            return
        if self._weights is None:
            self._weights = self._converted(unet, call.x)
        swaps = [*self._weights, *self._text_layers(unet, call.context)]
        for place, name, value in swaps:
            place[name] = value
        try:
            yield
        finally:
            for place, name, _ in swaps:
                del place[name]

    def _converted(self, unet: torch.nn.Module, x: torch.Tensor) -> list[_Swap]:
        if self._dtype is None:
            return []
        places = [
            (layer, name)
            for layer in unet.modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and _is_hosts_own(layer)
            for name, found in layer.named_parameters(recurse=False)
            if found.dtype is not self._dtype
        ]
        weights = [getattr(*place) for place in places]
        need = sum(one.numel() for one in weights) * self._dtype.itemsize
        room = management.get_free_memory(self._model.load_device) - management.minimum_inference_memory()
        room -= pass_memory(self._model, tuple(x.shape))
        if need > room:
            logging.info(
                f"KOALA: weights are converted to {self._dtype} at every step: to keep them so takes {need / GIB:.1f} "
                f"GiB, free beside a step are {max(room, 0) / GIB:.1f} GiB."
            )
            return []
        copies = _in_one_piece(weights, self._dtype)
        return [_Swap(vars(layer), name, copy) for (layer, name), copy in zip(places, copies, strict=True)]

    def _text_layers(self, unet: torch.nn.Module, text: torch.Tensor) -> Iterable[_Swap]:
        """What makes keys and values of this very text, each once."""
        layers = [layer for layer in _cross_attention_layers(unet) if _is_hosts_own(layer)]
        made = self._keys_and_values(text, sum(layer.out_features for layer in layers))
        if made is None:
            return []
        return [_Swap(vars(layer), "forward", partial(_once, layer, text, made)) for layer in layers]

    def _keys_and_values(self, text: torch.Tensor, features: int) -> dict[torch.nn.Module, torch.Tensor] | None:
        """Those that are kept of a text [batch, tokens, width], by layer; None where they take too much memory."""
        for known, made in self._texts:
            if known.dtype is text.dtype and torch.equal(known, text):
                return made
        size = text.shape[:-1].numel() * features * text.element_size()
        if not 0 < size <= MOST_TEXT:
            return None
        del self._texts[: max(0, len(self._texts) + 1 - MOST_TEXT // size)]
        self._texts.append((text.clone(), {}))
        return self._texts[-1][1]


def keeping(dtype: torch.dtype | None) -> Callable[..., torch.Tensor]:
    """A wrapper around a run (``OUTER_SAMPLE``), in which passes find its ``Kept`` by ``KEY``."""

    def outer_sample(executor: Executor, *arguments: Any, **further: Any) -> torch.Tensor:
        guider: Guider = executor.class_obj
        before = guider.model_options
        guider.model_options = create_model_options_clone(before)
        guider.model_options["transformer_options"][KEY] = Kept(guider.model_patcher, dtype)
        try:
            return executor(*arguments, **further)
        finally:
            guider.model_options = before

    return outer_sample


@contextmanager
def kept(executor: Executor, *arguments: Any) -> Iterator[None]:
    """While active, a pass (``DIFFUSION_MODEL``) uses what its run keeps, if it is part of a run and not compiled."""
    call = Call(*arguments)
    of_run: Kept | None = call.transformer_options.get(KEY)
    if of_run is None or torch.compiler.is_compiling():
        yield
        return
    with of_run.used(executor.class_obj, call):
        yield


def _cross_attention_layers(unet: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock) and block.attn2 is not None:
            yield block.attn2.to_k
            yield block.attn2.to_v


def _is_hosts_own(layer: torch.nn.Module) -> bool:
    """Whether a layer is one of ComfyUI's, and as ComfyUI made it."""
    weight = getattr(layer, "weight", None)
    return (
        isinstance(layer, CastWeightBiasOp)
        and not (layer.weight_function or layer.bias_function)
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and "forward" not in vars(layer)
    )


def _in_one_piece(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies in another type, in one piece of memory: the system gets it back as a whole, where of many pieces glibc
    keeps most when they are freed. Each begins at a multiple of ``LINE`` numbers."""
    parts = torch.empty(sum(map(_lines, tensors)), LINE, dtype=dtype).split([*map(_lines, tensors)])
    return [
        part.flatten()[: tensor.numel()].view(tensor.shape).copy_(tensor)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _lines(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() // LINE)


def _once(
    layer: torch.nn.Module, text: torch.Tensor, made: dict[torch.nn.Module, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    if x is not text:
        other: torch.Tensor = type(layer).forward(layer, x)
        return other
    if layer not in made:
        made[layer] = type(layer).forward(layer, x)
    return made[layer].clone()  # a patch may write into it
