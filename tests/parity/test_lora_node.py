"""KOALA LoRA Loader and KOALA Create Hook LoRA in ComfyUI: text encoders, stacks, folds, hooks, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from safetensors.torch import save_file

from koala_sdxl.koala.architecture.keys import tensors
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_TINY, SDXL
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.lora.names import find
from koala_sdxl.nodes.lora import KoalaHookLora, KoalaLoraLoader
from tools.measure import parity, transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL, State


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models/loras of this test's own."""
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "loras", ([str(tmp_path)], known["loras"][1]))
    return tmp_path


def load(loras: Path, state: State, model: Any, **inputs: Any) -> tuple[Any, Any, str]:
    """Run the node on a LoRA file with these tensors."""
    save_file(state, loras / "some.safetensors")
    wanted: dict[str, Any] = {
        "strength_model": 1.0,
        "strength_clip": 1.0,
        "trained_on": "auto",
        "fold_removed": 0.0,
    } | inputs
    return KoalaLoraLoader.execute(model, transfer.clip(), "some.safetensors", **wanted).result


def attention_lora(**options: Any) -> State:
    return adapters.lora(SMALL_SDXL, only=adapters.in_attention, **options)


def test_sdxls_names_are_all_that_the_host_knows() -> None:
    """Ours are at least those that core binds on SDXL itself, to the same weights."""
    core = comfy.lora.model_lora_keys_unet(transfer.hollow(SDXL).model, {})
    exist = {f"diffusion_model.{tensor.comfy}": tensor for tensor in tensors(SDXL) if tensor.comfy.endswith(".weight")}
    # class_embedding: another family's name, which core's table has beside SDXL's own for the same weight
    weights = {alias: exist[key] for alias, key in core.items() if key in exist and "class_embedding" not in alias}
    assert len(weights) > 4000
    assert {alias: find(SDXL, alias) for alias in weights} == weights


def test_model_and_clip_are_cloned_and_changed(loras: Path) -> None:
    model = parity.tiny_models()[0]
    text = adapters.text_lora(2, 32, 128, "lora_te1") | adapters.text_lora(2, 64, 256, "lora_te2")
    patched, clip, report = load(loras, attention_lora() | text, model, strength_model=0.5, strength_clip=0.25)
    assert not model.patches
    assert not transfer.clip().patcher.patches
    assert {entry[0] for listed in patched.patches.values() for entry in listed} == {0.5}
    assert {entry[0] for listed in clip.patcher.patches.values() for entry in listed} == {0.25}
    assert len(patched.patches) == 222
    keys = comfy.lora.model_lora_keys_clip(transfer.clip().cond_stage_model, {})
    expected = len(comfy.lora.load_lora(dict(text), keys, log_missing=False))
    assert len(clip.patcher.patches) == expected > 0
    assert f"text encoders: {expected} of 24 applied" in report.splitlines()


def test_a_lora_of_the_text_encoders_alone(loras: Path) -> None:
    model = parity.tiny_models()[0]
    patched, clip, report = load(loras, adapters.text_lora(1, 32, 128), model)
    assert not patched.patches
    assert len(clip.patcher.patches) == 6
    assert report == "some.safetensors\ntext encoders: 6 of 6 applied"
    far = {key.replace("layers_0", "layers_30"): value for key, value in adapters.text_lora(1, 32, 128).items()}
    with pytest.raises(
        CheckpointError, match=r"^some\.safetensors: none of its 6 modules can be applied .* \(6 unknown"
    ):
        load(loras, far, model)


def test_the_host_has_no_warning(loras: Path) -> None:
    state = adapters.lora(SMALL_SDXL, "LoCon") | adapters.text_lora(1, 32, 128)
    with transfer.warnings_of_host() as said:
        patched = load(loras, state, parity.tiny_models()[0])[0]
        transfer.baked(patched)
    assert said == []


def test_loras_stack(loras: Path) -> None:
    _, model = transfer.pair(KOALA_1B)
    first, second = attention_lora(seed=1), adapters.lora(SMALL_SDXL, "LoHa", seed=2)
    one = load(loras, first, model)[0]
    both = load(loras, second, one, strength_model=0.5)[0]
    original, alone, other = (
        transfer.baked(patched) for patched in (model, one, load(loras, second, model, strength_model=0.5)[0])
    )
    for key, weight in transfer.baked(both).items():
        torch.testing.assert_close(weight, alone[key] + other[key] - original[key], rtol=0, atol=1e-5)


def test_removed_layers_are_folded_with_their_weight(loras: Path) -> None:
    model = parity.tiny_models()[0]
    state = attention_lora()
    dropped, folded = (transfer.baked(load(loras, state, model, fold_removed=fold)[0]) for fold in (0.0, 0.5))
    sdxl = transfer.pair(transfer.KOALAS[0])[0]
    change = transfer.baked(comfy.sd.load_lora_for_models(sdxl, None, dict(state), 1.0, 0.0)[0])
    weights = transfer.sdxl_weights()
    for whole, part in lineage(KOALA_TINY).names("comfy").items():
        extra = torch.zeros_like(weights[whole])
        if ".transformer_blocks.4." in whole and whole.endswith(".weight"):
            for removed in range(5, 10):
                other = whole.replace(".transformer_blocks.4.", f".transformer_blocks.{removed}.")
                extra += 0.5 * (change[other] - weights[other])
        torch.testing.assert_close(folded[part] - dropped[part], extra, rtol=0, atol=1e-5)


def test_koalas_own_lora_goes_on_unchanged(loras: Path) -> None:
    """What core does with a LoRA that was trained on KOALA is right, and the same."""
    model = parity.tiny_models()[0]
    state = adapters.lora(KOALA_TINY, naming="kohya, diffusers blocks", only=adapters.in_attention)
    ours, _, report = load(loras, state, model)
    stock = comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0.0)[0]
    assert transfer.difference(transfer.baked(ours), transfer.baked(stock)) == 0
    assert "trained on koala-tiny: it has exactly koala-tiny's transformer blocks" in report


def test_a_hooked_lora_samples_as_a_loaded_one(loras: Path) -> None:
    _, model = transfer.pair(KOALA_1B)
    save_file(attention_lora(), loras / "some.safetensors")
    hooks, report = KoalaHookLora.execute(model, "some.safetensors", 0.7, 1.0, "auto").result
    assert "314 applied" in report
    layout = transfer.small(KOALA_1B)
    hooked = comfy.hooks.set_hooks_for_conditioning(transfer.conditioning(layout), hooks)
    loaded = load(loras, attention_lora(), model, strength_model=0.7)[0]
    wanted = transfer.sample(loaded, transfer.conditioning(layout), steps=2)
    plain = transfer.sample(model, transfer.conditioning(layout), steps=2)
    found = transfer.sample(model, hooked, steps=2)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_hooked_lora_encodes_as_a_loaded_one(loras: Path) -> None:
    """Both text encoders, DoRA in diffusers' names among it: the text is the same by hooks and by the loader."""
    model = parity.tiny_models()[0]
    state = adapters.text_lora(2, 32, 128, "lora_te1") | adapters.text_lora(2, 64, 256, "lora_te2_text_model_x")
    module = "text_encoder_2.encoder.layers.0.mlp.fc1"
    state = {key: value for key, value in state.items() if "_x_" not in key} | {
        f"{module}.lora_A.weight": 0.2 * torch.randn(2, 64),
        f"{module}.lora_B.weight": 0.2 * torch.randn(256, 2),
        f"{module}.lora_magnitude_vector": 1 + torch.rand(256),
    }
    loaded = load(loras, state, model, strength_clip=0.7)[1]
    hooks, report = KoalaHookLora.execute(model, "some.safetensors", 1.0, 0.7, "auto").result
    assert "text encoders: 13 for the CLIP that the hooks are set on" in report
    (hooked,) = SetClipHooks().apply_hooks(transfer.clip(), False, False, hooks)
    wanted, found, plain = (encode(clip) for clip in (loaded, hooked, transfer.clip()))
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def encode(clip: Any) -> torch.Tensor:
    """A text through a CLIP: both encoders' tokens, [1, tokens, width]."""
    return clip.encode_from_tokens_scheduled(clip.tokenize("a red star"))[0][0]


def test_a_hook_can_be_scheduled_and_added_to_others(loras: Path) -> None:
    model = parity.tiny_models()[0]
    save_file(attention_lora(), loras / "some.safetensors")
    first = KoalaHookLora.execute(model, "some.safetensors", 0.7, 1.0, "auto").result[0]
    both = KoalaHookLora.execute(model, "some.safetensors", 0.3, 1.0, "auto", prev_hooks=first).result[0]
    assert (len(first), len(both)) == (1, 2)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    silent = both.clone()
    silent.set_keyframes_on_hooks(keyframes)
    hooked = comfy.hooks.set_hooks_for_conditioning(transfer.conditioning(KOALA_TINY), silent)
    found = transfer.sample(model, hooked)
    torch.testing.assert_close(found, transfer.sample(model, transfer.conditioning(KOALA_TINY)), rtol=0, atol=1e-5)
