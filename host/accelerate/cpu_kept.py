"""What a run on the CPU computes once and keeps until it ends: nothing in it changes from step to step.

The prompt stays the same, and with it the keys and values that cross attention makes of it. A U-Net that computes in
bf16, while its weights have another type, converts them all at every step, which takes a fifth to a third of it; as far
as memory is free, they are kept as they were converted. Both give the same numbers, bit for bit.

Within a run only hooks change weights, as for LoRAs scheduled over the steps: passes with them use none of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management as management
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention
from comfy.ops import CastWeightBiasOp

from ..protocols import Executor, Guider, Model
from .branches import Call
from .exchanged import Part, run_options, running
from .gates import is_compiled_by_core
from .strategy import GIB, pass_memory

KEY = "koala_kept"
MOST_TEXT = 2**28
"""Bytes that the keys and values of a run's texts take at most: of some nine texts of KOALA-700M, prompt and negative
prompt together, in fp32."""
MIN_STEPS = 3
"""Weights are kept in runs of so many steps or more: to convert them into memory of their own takes as long as
converting them at two or three steps does."""
BATCHED = 1.5
"""ComfyUI computes prompt and negative prompt at once if so many times the memory is free that it takes."""
ALIGNMENT = 64
"""Numbers: a cache line or two, at which libraries like matrices to begin."""

Forward = Callable[[torch.Tensor], torch.Tensor]


class _Text(NamedTuple):
    """A text [batch, tokens, width], and what layers made of it; ``size``: bytes of what they all make."""

    text: torch.Tensor
    size: int
    made: dict[torch.nn.Module, torch.Tensor]


class Kept:
    """What one run keeps for its U-Net."""

    def __init__(self, model: Model, dtype: torch.dtype | None, latent: torch.Size) -> None:
        """``dtype``: the type in which weights are kept; None: they are not. ``latent``: the shape of the run's."""
        self._model, self._unet, self._dtype = model, model.model.diffusion_model, dtype
        self._latent = latent
        self._texts: list[_Text] = []
        self._weights: dict[torch.nn.Module, dict[str, torch.Tensor]] | None = None

    def used(self, unet: torch.nn.Module, call: Call) -> AbstractContextManager[None]:
        """While active, the U-Net's layers use what is kept, and make what is missing. Layers that another node has
        changed stay as they are, and so do another U-Net, and all layers with hooks or gradients."""
        if unet is not self._unet or self._model.current_hooks is not None or torch.is_grad_enabled():
            return nullcontext()
        return running(Part(*exchanged) for exchanged in self._forwards(call).items())

    def clear(self) -> None:
        """Give the memory back, whoever still holds this."""
        self._texts, self._weights = [], {}

    def _forwards(self, call: Call) -> dict[torch.nn.Module, Forward]:
        if self._weights is None:
            self._weights = self._converted(call.x)
        forwards: dict[torch.nn.Module, Forward] = {
            layer: partial(_with_weights, layer, weights, self._dtype)
            for layer, weights in self._weights.items()
            if _is_unmodified(layer)
        }
        layers = [layer for layer in _text_layers(self._unet) if _is_unmodified(layer)]
        made = self._made_of(call.context, sum(layer.out_features for layer in layers))
        if made is not None:
            for layer in layers:
                usual = forwards.get(layer, partial(type(layer).forward, layer))
                forwards[layer] = partial(_once, layer, usual, call.context, made)
        return forwards

    def _converted(self, x: torch.Tensor) -> dict[torch.nn.Module, dict[str, torch.Tensor]]:
        """Layers' weights in the type that they are kept in; none where memory is short. ``x``: of the first pass."""
        if self._dtype is None:
            return {}
        places = [
            (layer, name, weights)
            for layer in self._unet.modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and _is_unmodified(layer)
            for name, weights in layer.named_parameters(recurse=False)
            if weights.dtype is not self._dtype and weights.is_floating_point() and weights.is_contiguous()
        ]
        if not places:
            return {}
        need = sum(weights.numel() for *_, weights in places) * self._dtype.itemsize
        guided = max(2 * self._latent[0], len(x))
        one_pass = pass_memory(self._model, (guided, *self._latent[1:]))
        left = max(BATCHED * one_pass, one_pass + management.minimum_inference_memory())
        room = management.get_free_memory(self._model.load_device) - left
        if need > room:
            logging.info(
                f"KOALA: weights are converted to {self._dtype} at every step: keeping them takes {need / GIB:.1f} "
                f"GiB, and {max(room, 0) / GIB:.1f} GiB is free besides what a step needs."
            )
            return {}
        kept: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}
        copies = _in_one_piece([weights for *_, weights in places], self._dtype)
        for (layer, name, _), copy in zip(places, copies, strict=True):
            kept.setdefault(layer, {})[name] = copy
        return kept

    def _made_of(self, text: torch.Tensor, features: int) -> dict[torch.nn.Module, torch.Tensor] | None:
        """What is kept of a text, by layer; None where it would be too much. ``features``: that all layers make."""
        for known in self._texts:
            if known.text.dtype is text.dtype and torch.equal(known.text, text):
                return known.made
        size = text.shape[:-1].numel() * features * text.element_size()
        if size > MOST_TEXT:
            return None
        while sum(known.size for known in self._texts) > MOST_TEXT - size:
            del self._texts[0]
        self._texts.append(_Text(text.clone(), size, {}))
        return self._texts[-1].made


def keeping(dtype: torch.dtype | None) -> Callable[..., torch.Tensor]:
    """A wrapper around a run (``OUTER_SAMPLE``), in which passes find its ``Kept`` by ``KEY``."""

    def outer_sample(executor: Executor, *arguments: Any, **further: Any) -> torch.Tensor:
        guider: Guider = executor.class_obj
        if is_compiled_by_core(guider.model_options["transformer_options"]):
            return executor(*arguments, **further)
        noise, _, _, sigmas, *_ = arguments
        of_run = Kept(guider.model_patcher, dtype if len(sigmas) > MIN_STEPS else None, noise.shape)
        try:
            with run_options(guider, **{KEY: of_run}):
                return executor(*arguments, **further)
        finally:
            of_run.clear()

    return outer_sample


def kept(executor: Executor, *arguments: Any) -> AbstractContextManager[None]:
    """While active, a pass (``DIFFUSION_MODEL``) uses what its run keeps, if it is part of a run and not compiled."""
    call = Call(*arguments)
    of_run: Kept | None = None if torch.compiler.is_compiling() else call.transformer_options.get(KEY)
    return nullcontext() if of_run is None else of_run.used(executor.class_obj, call)


def _text_layers(unet: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    """Those that make keys and values of the text."""
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock) and type(block.attn2) is CrossAttention:
            yield block.attn2.to_k
            yield block.attn2.to_v


def _is_unmodified(layer: torch.nn.Module) -> bool:
    """Whether a layer is one of ComfyUI's, and as ComfyUI made it."""
    return (
        isinstance(layer, CastWeightBiasOp)
        and not (layer.weight_function or layer.bias_function)
        and type(getattr(layer, "weight", None)) in (torch.Tensor, torch.nn.Parameter)
        and "forward" not in vars(layer)
    )


def _in_one_piece(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies in another type, in one piece of memory: the system gets it back as a whole, where of many pieces glibc
    keeps most when they are freed. Each begins at a multiple of ``ALIGNMENT`` numbers."""
    lines = [-(-tensor.numel() // ALIGNMENT) for tensor in tensors]
    parts = torch.empty(sum(lines), ALIGNMENT, dtype=dtype).split(lines)
    return [
        part.flatten()[: tensor.numel()].view(tensor.shape).copy_(tensor)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _with_weights(
    layer: torch.nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype | None, x: torch.Tensor
) -> torch.Tensor:
    """The layer's own ``forward`` with weights of a type, if the input is of that type: else it needs others."""
    own = weights if x.dtype is dtype else {}
    try:
        vars(layer).update(own)  # an attribute of the layer's own hides the parameter of that name
        output: torch.Tensor = type(layer).forward(layer, x)
    finally:
        for name in own:
            vars(layer).pop(name, None)
    return output


def _once(
    layer: torch.nn.Module,
    usual: Forward,
    text: torch.Tensor,
    made: dict[torch.nn.Module, torch.Tensor],
    x: torch.Tensor,
) -> torch.Tensor:
    if x is not text:
        return usual(x)
    if layer not in made:
        made[layer] = usual(x)
    return made[layer].clone()  # a patch may write into it
