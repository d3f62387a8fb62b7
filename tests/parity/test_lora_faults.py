"""What KOALA LoRA Loader calls applied, ComfyUI computes without a word; what ComfyUI cannot compute has a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import comfy.lora
import pytest
import torch
from safetensors.torch import save_file

from koala_sdxl.host.transfer.lora import apply_lora, hook_lora
from koala_sdxl.koala.architecture.keys import Shape
from tools.measure import parity, transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import State

LINEAR = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_input_blocks_4_0_out_layers_3"
NORM = "lora_unet_input_blocks_4_1_transformer_blocks_0_norm1"
GOOD = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"
KEYS = {LINEAR: "input_blocks.3.1.transformer_blocks.0.attn1.to_q", CONVOLUTION: "input_blocks.3.0.out_layers.3",
        NORM: "input_blocks.3.1.transformer_blocks.0.norm1"}  # fmt: skip
SHAPES = {LINEAR: (64, 64), CONVOLUTION: (64, 64, 3, 3), NORM: (64,)}

Random = Callable[..., torch.Tensor]


def _glora(shape: Shape, random: Random) -> State:
    shapes = {"a1": (shape[1], 2), "a2": (2, shape[1]), "b1": (shape[0], 2), "b2": (2, prod(shape[1:]))}
    return {f".{name}.weight": random(*size) for name, size in shapes.items()} | {".alpha": torch.tensor(1.5)}


def _oft(shape: Shape, random: Random) -> State:
    return {
        ".oft_blocks": random(shape[0] // 4, 4, 4),
        ".rescale": 1 + random(shape[0], *[1] * (len(shape) - 1)),
        ".alpha": torch.tensor(0.0),
    }


def _boft(shape: Shape, random: Random) -> State:
    return {".oft_blocks": random(2, shape[0] // 4, 4, 4)}


def _whole(shape: Shape, random: Random) -> State:
    return {".set_weight": random(*shape)}


def _lokr_tucker(shape: Shape, random: Random) -> State:
    return {
        ".lokr_w1": random(2, 4),
        ".lokr_w2_a": random(2, shape[0] // 2),
        ".lokr_w2_b": random(2, shape[1] // 4),
        ".lokr_t2": random(2, 2, *shape[2:]),
        ".alpha": torch.tensor(1.5),
    }


PARTS: dict[str, tuple[str, Callable[[Shape, Random], State]]] = {
    "LoRA": (LINEAR, adapters.KINDS["LoRA"].parts),
    "LoCon": (CONVOLUTION, adapters.KINDS["LoCon"].parts),
    "LoCon with mid": (CONVOLUTION, adapters.KINDS["LoCon with mid"].parts),
    "LoHa": (LINEAR, adapters.KINDS["LoHa"].parts),
    "LoHa, Tucker": (CONVOLUTION, adapters.KINDS["LoHa, Tucker"].parts),
    "LoKr": (CONVOLUTION, adapters.KINDS["LoKr"].parts),
    "LoKr, low rank": (CONVOLUTION, adapters.KINDS["LoKr, low rank"].parts),
    "LoKr, Tucker": (CONVOLUTION, _lokr_tucker),
    "DoRA": (CONVOLUTION, adapters.KINDS["DoRA"].parts),
    "whole differences": (CONVOLUTION, adapters.KINDS["whole differences"].parts),
    "norms": (NORM, adapters.KINDS["norms"].parts),
    "GLoRA": (CONVOLUTION, _glora),
    "OFT": (CONVOLUTION, _oft),
    "BOFT": (LINEAR, _boft),
    "whole weight": (CONVOLUTION, _whole),
}

DAMAGES: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "none": lambda tensor: tensor,
    "missing": lambda tensor: None,
    "scalar": lambda tensor: tensor.flatten()[0].clone(),
    "flat": lambda tensor: tensor.flatten(),
    "transposed": lambda tensor: tensor.transpose(0, 1) if tensor.ndim > 1 else tensor,
    "a row less": lambda tensor: tensor[:-1] if tensor.ndim else tensor,
    "a column less": lambda tensor: tensor[..., :-1] if tensor.ndim else tensor,
    "another dimension": lambda tensor: tensor[None],
    "one more at the end": lambda tensor: tensor[..., None],
    "twice": lambda tensor: torch.stack([tensor, tensor]),
    "int8": lambda tensor: tensor.to(torch.int8),
    "bool": lambda tensor: tensor.to(torch.bool),
    "float64": lambda tensor: tensor.double(),
    "fp8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "NaN": lambda tensor: tensor * math.nan,
    "empty": lambda tensor: tensor[:0] if tensor.ndim else tensor[None][:0],
}


def random_parts(kind: str) -> State:
    module, parts = PARTS[kind]
    generator = torch.Generator().manual_seed(0)
    return parts(SHAPES[module], lambda *shape: 0.2 * torch.randn(shape, generator=generator))


FAULTS = [(kind, damage) for kind in PARTS for damage in DAMAGES]
BY_DAY = FAULTS[::3]
"""With sixteen kinds of damage, each of them in some kinds of files."""


@pytest.mark.parametrize(
    ("kind", "damage"),
    [pytest.param(*fault, marks=[] if fault in BY_DAY else pytest.mark.nightly) for fault in FAULTS],
)
def test_what_is_called_applied_is_computed(kind: str, damage: str, tmp_path: Path) -> None:
    module, parts = PARTS[kind][0], random_parts(kind)
    good = {GOOD + suffix: tensor for suffix, tensor in random_parts("LoRA").items()}
    for suffix, tensor in parts.items():
        damaged = DAMAGES[damage](tensor)
        state = {module + other: value for other, value in parts.items() if other != suffix}
        state |= {} if damaged is None else {module + suffix: damaged.contiguous()}
        if not state:
            continue
        with transfer.warnings_of_host() as said:
            applied = apply(tmp_path, state | good)
            changes = {key: changed(applied.model, key) for key in applied.model.patches}
        (found,) = (entry for entry in applied.plan.modules if entry.name == module)
        own = {key: change for key, change in changes.items() if KEYS[module] in key}
        assert said == [], f"{suffix}: {found}"
        assert all(changes.values()), f"{suffix}: {changes}"
        if damage == "none":
            assert found.outcome == "applied"
        assert (found.outcome == "applied") == bool(own), f"{suffix}: {found}"
        assert found.outcome == "applied" or found.reason or found.outcome == "mismatch", f"{suffix}: {found}"


def apply(folder: Path, state: State, strength: float = 0.8) -> Any:
    save_file(state, folder / "some.safetensors")
    return apply_lora(parity.tiny_models()[0], transfer.clip(), folder / "some.safetensors", strength, strength)


@cache
def weights() -> State:
    """koala-tiny's U-Net, unpatched."""
    found: State = parity.tiny_models()[0].model_state_dict()
    return found


def changed(model: Any, key: str) -> bool:
    """Whether a weight's patches change it, to finite numbers of the same shape."""
    weight = weights()[key].float()
    patched = comfy.lora.calculate_weight(model.patches[key], weight.clone(), key)
    return patched.shape == weight.shape and bool(patched.isfinite().all()) and not torch.equal(patched, weight)


@pytest.mark.parametrize("kind", PARTS)
def test_hooks_have_the_loaders_patches(kind: str, tmp_path: Path) -> None:
    """Of U-Net and text encoders, with alphas from the header: a weight that is patched either way is the same."""
    module = PARTS[kind][0]
    state = {module + suffix: tensor for suffix, tensor in random_parts(kind).items()}
    state |= adapters.text_lora(2, 32, 128)
    applied = apply(tmp_path, state)
    hooks, plan, text = hook_lora(parity.tiny_models()[0], tmp_path / "some.safetensors", 0.8, 0.8)
    assert (plan.modules, text) == (applied.plan.modules, "12 for the CLIP that the hooks are set on")
    (hook,) = hooks.hooks  # type: ignore[attr-defined]
    for patcher, patches in ((applied.model, hook.weights), (applied.clip.patcher, hook.weights_clip)):
        assert patches.keys() == patcher.patches.keys() != set()
        for key, patch in patches.items():
            weight = patcher.model_state_dict()[key].float()
            wanted = comfy.lora.calculate_weight(patcher.patches[key], weight.clone(), key)
            found = comfy.lora.calculate_weight([(0.8, patch, 1.0, None, None)], weight.clone(), key)
            assert torch.equal(found, wanted)


def test_strength_that_is_no_number_is_refused(tmp_path: Path) -> None:
    state = {LINEAR + suffix: tensor for suffix, tensor in random_parts("LoRA").items()}
    for strength in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^strength_model is (nan|inf); expected a finite number"):
            apply(tmp_path, state, strength)


@pytest.mark.parametrize("kind", ["OFT", "whole weight", "DoRA"])
def test_half_the_strength_goes_half_the_way(kind: str, tmp_path: Path) -> None:
    """At strength 0.5 a weight that is replaced is in the middle between the old and the new."""
    module = PARTS[kind][0]
    parts = {suffix: tensor for suffix, tensor in random_parts(kind).items() if suffix != ".rescale"}
    state = {module + suffix: tensor for suffix, tensor in parts.items()}
    key = f"diffusion_model.{KEYS[module]}.weight"
    weight = parity.tiny_models()[0].model_state_dict()[key].float()
    half, whole = (
        comfy.lora.calculate_weight(apply(tmp_path, state, strength).model.patches[key], weight.clone(), key)
        for strength in (0.5, 1.0)
    )
    torch.testing.assert_close(half, (weight + whole) / 2, rtol=0, atol=1e-6)
    assert (whole - weight).abs().max() > 0.01


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "input channels"])
def test_dora_has_its_magnitudes_as_norms(axis: int, tmp_path: Path) -> None:
    """What DoRA is (Liu et al. 2024, eq. 5): the norm of each row, or of each input channel, of the new weight is its
    magnitude, whatever the change."""
    parts = random_parts("DoRA")
    norms = 1 + torch.rand(64)
    parts[".dora_scale"] = norms.reshape(-1, 1, 1, 1) if axis == 0 else norms.reshape(1, -1, 1, 1)
    patched = apply(tmp_path, {CONVOLUTION + suffix: tensor for suffix, tensor in parts.items()}, 1.0).model
    key = f"diffusion_model.{KEYS[CONVOLUTION]}.weight"
    weight = patched.model_state_dict()[key].float()
    found = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key)
    torch.testing.assert_close(found.transpose(0, axis).flatten(1).norm(dim=1), norms, rtol=0, atol=1e-5)
