"""What is exchanged for the time of a pass or of a run, and put back after it, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import create_model_options_clone

from ..protocols import Guider


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
