"""What `dev.py carry` makes of weights without ComfyUI is what KOALA LoRA Loader makes of them in it."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.sd
import pytest
import torch

from koala_sdxl.distill.carry.changes import changed_weights
from koala_sdxl.distill.carry.names import text_names
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.keys import renaming, tensors
from koala_sdxl.koala.architecture.layout import KOALA_700M
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.koala.lora.factors import factors, lora_tensors
from koala_sdxl.koala.lora.plan import inspect_lora
from koala_sdxl.koala.lora.weights import load
from tests.parity.test_lora_faults import PARTS, SHAPES
from tools.measure import transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL, State

LAYOUT = transfer.small(KOALA_700M)
NAMES = renaming(LAYOUT, "diffusers", "comfy")
BOUND = 2e-5
"""Largest difference of a weight: both compute in fp32, in another order."""


def model() -> tuple[Any, State]:
    """A small random KOALA as a MODEL, and its weights by diffusers' names."""
    weights = lineage(LAYOUT).cut(transfer.sdxl_weights(), "comfy")
    return transfer.pair(KOALA_700M)[1], {name: weights[comfy] for name, comfy in NAMES.items()}


def same(state: State) -> int:
    """Hold both ways against each other; returns how many weights and biases are changed."""
    patched, own = model()
    with transfer.on_disk(state) as path:
        theirs = transfer.baked(apply_lora(patched, transfer.clip(), path, 1.0, 0.0).model)
        ours = dict(changed_weights(load(inspect_lora(path, LAYOUT)).unet, LAYOUT, own.__getitem__))
    moved = {name for name, comfy_name in NAMES.items() if not torch.equal(theirs[comfy_name], own[name])}
    assert moved == ours.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[NAMES[name]], rtol=1e-4, atol=BOUND)
    return len(moved)


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_every_kind_changes_every_weight_as_the_node_does(kind: str) -> None:
    wanted = sum(
        len(adapters.KINDS[kind].parts(tensor.shape, torch.zeros).keys() & {".diff_b", ".b_norm"}) + 1
        for tensor in tensors(LAYOUT)
        if tensor.diffusers.endswith(".weight") and adapters.KINDS[kind].fits(tensor)
    )
    assert same(adapters.lora(SMALL_SDXL, kind)) == wanted > 20


@pytest.mark.parametrize("kind", PARTS)
def test_so_does_a_module_of_the_rarer_kinds(kind: str) -> None:
    module, parts = PARTS[kind]
    generator = torch.Generator().manual_seed(4)
    tensors_ = parts(SHAPES[module], lambda *shape: 0.2 * torch.randn(shape, generator=generator))
    assert same({module + suffix: tensor for suffix, tensor in tensors_.items()}) in (1, 2)


@pytest.mark.parametrize("kind", ["LoCon", "norms", "whole differences"])
def test_the_file_does_the_same_by_our_node_and_by_the_stock_one(kind: str) -> None:
    """Convolutions, norms and biases have places of their own in a file; text encoders are passed through."""
    patched, own = model()
    text = adapters.text_lora(2, 32, 128, "lora_te1") | adapters.text_lora(2, 64, 256, "lora_te2")
    with transfer.on_disk(adapters.lora(SMALL_SDXL, kind) | text) as path:
        source = load(inspect_lora(path, LAYOUT))
    wanted = dict(changed_weights(source.unet, LAYOUT, own.__getitem__))
    numbers = factors(((name, new - own[name]) for name, new in wanted.items()), 640)
    state = lora_tensors(numbers, LAYOUT) | text_names(source.text)
    metadata = {"ss_base_model_version": "koala"}
    with transfer.on_disk(state, metadata=metadata) as path:
        ours = apply_lora(patched, transfer.clip(), path, 1.0, 1.0)
    with transfer.warnings_of_host() as said:
        stock, clip = comfy.sd.load_lora_for_models(patched, transfer.clip(), dict(state), 1.0, 1.0)
    assert said == []
    assert ours.plan.origin
    assert ours.plan.origin.layout == LAYOUT
    assert {module.outcome for module in (*ours.plan.modules, *ours.plan.text)} == {"applied"}
    assert len(ours.plan.text) == 24
    assert clip.patcher.patches.keys() == ours.clip.patcher.patches.keys()
    for made in (transfer.baked(ours.model), transfer.baked(stock)):
        for name, weight in own.items():
            torch.testing.assert_close(made[NAMES[name]], wanted.get(name, weight), rtol=1e-2, atol=2e-3)
