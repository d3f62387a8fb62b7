"""koala-tiny as the tests of a file share it: no other file sees it, and none may change its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tools.measure import parity

State = dict[str, torch.Tensor]


def of_this_file() -> Iterator[None]:
    """A fixture's body, for a file: ``parity.tiny_models()`` and ``parity.tiny_pipeline()`` are its own.

    Fails where the weights are others after the file's tests than before, once all patches are taken off.
    """
    yield
    parity.tiny_pipeline.cache_clear()
    if not parity.tiny_models.cache_info().currsize:
        return
    shared = _weights(*parity.tiny_models())
    parity.tiny_models.cache_clear()
    changed = [
        name for name, tensor in _weights(*parity.tiny_models()).items() if not torch.equal(shared[name], tensor)
    ]
    assert not changed, f"a test of this file wrote into the weights that it shares with others: {', '.join(changed)}"


def _weights(model: Any, clip: Any, vae: Any) -> State:
    """Every tensor of a model's parts, without patches."""
    from comfy.model_management import unload_all_models

    unload_all_models()
    networks = {"model": model.model, "clip": clip.cond_stage_model, "vae": vae.first_stage_model}
    return {
        f"{part}.{name}": tensor for part, network in networks.items() for name, tensor in network.state_dict().items()
    }
