"""What is exchanged for the time of a pass or of a run, and put back after it, however it ends; and a VAE's methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import create_model_options_clone

from ..protocols import Guider, Vae


class Part(NamedTuple):
    """A module of a network, and what runs in place of its ``forward``, with the same arguments."""

    module: torch.nn.Module
    forward: Callable[..., torch.Tensor]


@contextmanager
def running(chosen: Iterable[Part]) -> Iterator[None]:
    """Within this context each part's ``forward`` runs. For one thread at a time, as a network itself is."""
    exchanged = []
    try:
        for module, forward in chosen:
            if "forward" not in vars(module):  # or someone else has exchanged it
                vars(module)["forward"] = forward
                exchanged.append(module)
        yield
    finally:
        for module in exchanged:
            vars(module).pop("forward", None)


@contextmanager
def run_options(guider: Guider, **values: Any) -> Iterator[None]:
    """Within this context, a run's, passes find ``values`` in their transformer options."""
    before = guider.model_options
    guider.model_options = create_model_options_clone(before)
    guider.model_options["transformer_options"] |= values
    try:
        yield
    finally:
        guider.model_options = before


def with_methods(vae: Vae, run: Callable[..., torch.Tensor]) -> Vae:
    """A VAE like ``vae``, whose decoding and encoding is left to ``run``: it gets the network, the method and its
    arguments. That goes for copies of it, too, as other nodes make them, while they are on such a device."""
    kind = type(vae)
    faster = copy.copy(vae)  # shares the network; ComfyUI has no other way to clone a VAE
    methods = {
        "decode": kind.decode,
        "decode_tiled": kind.decode_tiled,
        "encode": kind.encode,
        "encode_tiled": kind.encode_tiled,
    }
    own = {name: vars(faster).pop(name) for name in methods if name in vars(faster)}  # another node's

    def by_run(name: str, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(plain)
        def exchanged(self: Vae, *arguments: Any, **options: Any) -> torch.Tensor:
            method: Callable[..., torch.Tensor] = own.get(name) or partial(plain, self)
            if self.device.type != vae.device.type:
                return method(*arguments, **options)
            return run(self.first_stage_model, method, *arguments, **options)

        return exchanged

    faster.__class__ = type(kind.__name__, (kind,), {name: by_run(name, plain) for name, plain in methods.items()})
    return faster
