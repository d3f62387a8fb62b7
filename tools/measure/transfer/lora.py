"""Where an SDXL LoRA's changes land on a KOALA, and whether they are the right ones."""

from __future__ import annotations

from typing import NamedTuple

import comfy.lora
import comfy.sd
import torch

from koala_sdxl.host.model import ATTACHMENT
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.keys import tensors
from koala_sdxl.koala.architecture.layout import SDXL, Layout
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.koala.model_info import assumed_facts
from tools.measure.transfer.models import NETWORK, baked, clip, difference, hollow, on_disk, pair, sdxl_weights, small
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL, State

SQUARE_BOUND = 1e-6
"""Largest difference of a weight, fp32, between the two ways of ``square``."""


class Square(NamedTuple):
    """Applied to SDXL and then cut, against cut and then applied: the largest difference of a weight, and how large the
    change itself is."""

    difference: float
    change: float


def square(koala: Layout, kind: str = "LoRA", naming: str = "kohya, LDM blocks", strength: float = 0.8) -> Square:
    """Both ways round for a random LoRA; the stock loader applies it to SDXL, ours to KOALA. For DoRA, which the stock
    loader computes in another way than the tools that train it, PEFT's formula is applied to SDXL."""
    sdxl, cut_out = pair(koala)
    state = adapters.lora(SMALL_SDXL, kind, naming)
    stock_state = adapters.lora(SMALL_SDXL, kind)  # the stock loader does not know all names, so one that it knows
    if kind == "DoRA":
        changed = sdxl_weights() | _decomposed(stock_state, strength)
    else:
        changed = baked(comfy.sd.load_lora_for_models(sdxl, None, dict(stock_state), strength, 0.0)[0])
    with on_disk(state) as path:
        ours = apply_lora(cut_out, clip(), path, strength, 0.0).model
    cut_afterwards = lineage(small(koala)).cut(changed, "comfy")
    original = lineage(small(koala)).cut(sdxl_weights(), "comfy")
    return Square(difference(cut_afterwards, baked(ours)), difference(cut_afterwards, original))


def _decomposed(state: State, strength: float) -> State:
    """Weights of the small SDXL with a DoRA of kohya's names, as PEFT merges it (peft/tuners/lora/variants.py): each
    row of weight and change together gets the magnitude as its norm."""
    weights, style = sdxl_weights(), adapters.NAMINGS["kohya, LDM blocks"]
    changed = {}
    for tensor in tensors(SMALL_SDXL):
        module = style.module(tensor)
        if f"{module}.dora_scale" in state:
            up, down = state[f"{module}.lora_up.weight"], state[f"{module}.lora_down.weight"]
            weight = weights[tensor.comfy]
            change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * state[f"{module}.alpha"] / len(down)
            norms = (weight + change).flatten(1).norm(dim=1).reshape(state[f"{module}.dora_scale"].shape)
            whole = state[f"{module}.dora_scale"] * (weight + change) / norms
            changed[tensor.comfy] = weight + strength * (whole - weight)
    return changed


class Reach(NamedTuple):
    """How many of a KOALA's modules got their own layer's change, another layer's, or none; and what the loader did
    with the LoRA's modules."""

    right: int
    wrong: int
    untouched: int
    applied: int
    mismatch: int
    absent: int


def numbered_lora(naming: str) -> State:
    """An SDXL LoRA of rank 1 that adds its module's own number to each weight, which so shows whose change it got."""
    style = adapters.NAMINGS[naming]
    state = {}
    for number, tensor in enumerate(filter(adapters.in_attention, tensors(SDXL)), 1):
        for suffix, value in (
            (".lora_up.weight", torch.full((tensor.shape[0], 1), float(number))),
            (".lora_down.weight", torch.ones(1, tensor.shape[1])),
        ):
            state[style.module(tensor) + style.suffixes.get(suffix, suffix)] = value
    return state


def reach(koala: Layout, naming: str, ours: bool) -> Reach:
    """Where the modules of an SDXL LoRA (all 722 matrices of its attention modules) land on a full-size KOALA."""
    numbers = {tensor.diffusers: n for n, tensor in enumerate(filter(adapters.in_attention, tensors(SDXL)), 1)}
    state, target = numbered_lora(naming), hollow(koala)
    if ours:
        target.set_attachments(ATTACHMENT, assumed_facts(koala, "fp32", 0))
        with on_disk(state) as path:
            patches = apply_lora(target, clip(), path, 1.0, 0.0).model.patches
    else:
        patches = comfy.sd.load_lora_for_models(target, None, state, 1.0, 0.0)[0].patches
    right = wrong = mismatch = 0
    for tensor, origin in lineage(koala).tensors:
        if not adapters.in_attention(tensor):
            continue
        if listed := patches.get(NETWORK + tensor.comfy):
            change = comfy.lora.calculate_weight(listed, torch.zeros(tensor.shape), tensor.comfy)
            number = float(change.flatten()[0])
            mismatch += number == 0  # the host could not apply it
            right += number == numbers[origin.diffusers]
            wrong += number not in (0, numbers[origin.diffusers])
    total = sum(map(adapters.in_attention, tensors(koala)))
    return Reach(right, wrong, total - right - wrong, right + wrong, mismatch, len(numbers) - right - wrong - mismatch)
