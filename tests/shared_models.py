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
    _let_go()
    yield
    if parity.tiny_models.cache_info().currsize:
        shared = _weights(*parity.tiny_models())
        _let_go()
        fresh = _weights(*parity.tiny_models())
        _let_go()
        changed = [name for name, tensor in fresh.items() if not torch.equal(shared[name], tensor)]
        assert not changed, (
            f"a test of this file wrote into the weights that it shares with others: {', '.join(changed)}"
        )
    _let_go()


def _let_go() -> None:
    """What is loaded next is read from the file, even if somebody still has what was loaded before: the loader would
    share it."""
    from koala_sdxl import koala_loader

    parity.tiny_models.cache_clear()
    parity.tiny_pipeline.cache_clear()
    koala_loader._unpatched.clear()


def _weights(model: Any, clip: Any, vae: Any) -> State:
    """Every tensor of a model's parts, without patches."""
    from comfy.model_management import unload_all_models

    unload_all_models()
    return tensors(model, clip, vae)


def tensors(model: Any, clip: Any, vae: Any) -> State:
    """Every tensor of a model's parts, as it is now."""
    networks = {"model": model.model, "clip": clip.cond_stage_model, "vae": vae.first_stage_model}
    return {
        f"{part}.{name}": tensor for part, network in networks.items() for name, tensor in network.state_dict().items()
    }
