"""KOALA U-Net Swap: what an SDXL MODEL has is carried over, each part to where it belongs."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_extras.nodes_attention_multiply import UNetCrossAttentionMultiply
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from safetensors.torch import save_file

from koala_sdxl import koala_loader
from koala_sdxl.host.model import ATTACHMENT, model_facts
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.host.transfer.swap import swap
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, SDXL, Layout, name
from koala_sdxl.koala.architecture.lineage import Lineage, attention_depths, lineage
from koala_sdxl.koala.files.conventions import KEPT_TRANSFORMERS_KEY
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.nodes.swap import KoalaUNetSwap
from tools.measure import transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL


def attention_lora() -> dict[str, torch.Tensor]:
    return adapters.lora(SMALL_SDXL, only=adapters.in_attention)


def sampled(model: Any) -> torch.Tensor:
    return transfer.sample(model, transfer.conditioning(SMALL_SDXL), steps=2)


@pytest.mark.parametrize("layout", [KOALA_700M, KOALA_1B], ids=name)
def test_a_lora_upstream_equals_one_downstream(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, koala = transfer.pair(layout)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    save_file(lineage(transfer.small(layout)).cut(transfer.sdxl_weights(), "comfy"), tmp_path / "koala.safetensors")
    before, _ = comfy.sd.load_lora_for_models(whole, None, attention_lora(), 0.7, 0.0)
    swapped, report = KoalaUNetSwap.execute(before, "koala.safetensors", "default").result
    with transfer.on_disk(attention_lora()) as path:
        after = apply_lora(koala, transfer.clip(), path, 0.7, 0.0).model
    assert transfer.difference(transfer.baked(swapped), transfer.baked(after)) == 0
    torch.testing.assert_close(sampled(swapped), sampled(after), rtol=0, atol=0)
    applied = {KOALA_700M: 222, KOALA_1B: 314}[layout]
    assert f"weight patches: {applied} carried over, {722 - applied} are for layers" in report
    assert model_facts(swapped).source == "koala.safetensors"


def test_a_student_gets_the_changes_of_the_blocks_that_its_file_names(tmp_path: Path) -> None:
    """By the LoRA loader and by the swap, what SDXL's LoRA makes of just those blocks."""
    own = transfer.small(KOALA_700M)
    kept = {module: (0, 2, 4, 6, 9) if depth == 5 else (0, 1) for module, depth in attention_depths(own).items()}
    even = Lineage(own, kept)
    save_file(
        even.cut(transfer.sdxl_weights(), "comfy"),
        tmp_path / "even.safetensors",
        {KEPT_TRANSFORMERS_KEY: json.dumps(kept)},
    )
    student = koala_loader.load_unet(inspect_model(tmp_path / "even.safetensors"), "even")
    changed, _ = comfy.sd.load_lora_for_models(transfer.pair(KOALA_700M)[0], None, attention_lora(), 0.7, 0.0)
    wanted = even.cut(transfer.baked(changed), "comfy")
    with transfer.on_disk(attention_lora()) as path:
        loaded = apply_lora(student, transfer.clip(), path, 0.7, 0.0).model
    for found in (loaded, swap(changed, student).model):
        assert transfer.difference(transfer.baked(found), wanted) < 1e-6
        assert model_facts(found).kept_transformers == kept


def test_neither_model_is_changed() -> None:
    whole, koala = transfer.pair(KOALA_700M)
    before, _ = comfy.sd.load_lora_for_models(whole, None, attention_lora(), 0.7, 0.0)
    swapped = swap(before, koala).model
    assert not koala.patches
    assert len(before.patches) == 722
    assert not koala.model_options["transformer_options"]
    assert swapped.model is koala.model
    assert swapped.patches_uuid != koala.patches_uuid


def test_sampling_changes_and_cfg_functions_go_along() -> None:
    whole, koala = transfer.pair(KOALA_700M)
    changed = ModelSamplingDiscrete().patch(whole, "eps", True)[0]
    changed = RescaleCFG().patch(changed, 0.7)[0]
    swapped = swap(changed, koala).model
    assert swapped.get_model_object("model_sampling") is changed.get_model_object("model_sampling")
    assert swapped.model_options["sampler_cfg_function"] is changed.model_options["sampler_cfg_function"]
    alone = RescaleCFG().patch(ModelSamplingDiscrete().patch(koala, "eps", True)[0], 0.7)[0]
    torch.testing.assert_close(sampled(swapped), sampled(alone), rtol=0, atol=0)


def test_scaled_weights_go_along() -> None:
    """Core's attention multipliers scale SDXL's own weights: a merge with nothing, and no other model's."""
    whole, koala = transfer.pair(KOALA_700M)
    swapped, report = swap(UNetCrossAttentionMultiply.execute(whole, 1.2, 1.0, 1.1, 0.9).result[0], koala)
    wanted = UNetCrossAttentionMultiply.execute(koala, 1.2, 1.0, 1.1, 0.9).result[0]
    assert transfer.difference(transfer.baked(swapped), transfer.baked(wanted)) == 0
    assert transfer.difference(transfer.baked(swapped), transfer.baked(koala)) > 0
    assert "weight patches: 105 carried over, 245 are for layers that koala-tiny lacks" in report
    assert "merged" not in report


def test_wrappers_callbacks_and_attachments_go_along() -> None:
    whole, koala = transfer.pair(KOALA_700M)
    changed = whole.clone()
    calls = []

    def wrapper(executor: Any, *arguments: Any, **further: Any) -> Any:
        calls.append("wrapper")
        return executor(*arguments, **further)

    changed.add_wrapper(WrappersMP.DIFFUSION_MODEL, wrapper)
    changed.add_callback(CallbacksMP.ON_PRE_RUN, lambda _: calls.append("callback"))
    changed.set_attachments("mine", 5)
    swapped = swap(changed, koala).model
    sampled(swapped)
    assert set(calls) == {"wrapper", "callback"}
    assert swapped.get_attachment("mine") == 5
    assert swapped.get_attachment(ATTACHMENT) is koala.get_attachment(ATTACHMENT)


def test_attention_patches_go_to_their_blocks() -> None:
    """As many as KOALA has layers, and the swap says how many have none."""
    whole, koala = transfer.pair(KOALA_700M)
    ran = set()

    def patch(place: tuple[Any, ...]) -> Any:
        def replacement(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
            ran.add(place)
            assert (*options["block"], options["block_index"]) == place  # it is told SDXL's numbers
            return q

        return replacement

    patched = transfer.ip_adapter(whole, patch)
    swapped, report = swap(patched, koala)
    assert len(patched.model_options["transformer_options"]["patches_replace"]["attn2"]) == 70
    sampled(swapped)
    line = lineage(transfer.small(KOALA_700M))
    assert ran == {(*line.blocks[block], there) for block, kept in line.attention.items() for there in kept}
    assert "attention and block patches: 21 remapped to koala-tiny's blocks" in report
    assert "dropped: attention patches on blocks that koala-tiny lacks (input 5 layer 0" in report


def test_block_patches_by_sdxls_numbers_work() -> None:
    """Deep shrink at SDXL's block 3, the second stage's start, shrinks at the same place of a KOALA."""
    whole, koala = transfer.pair(KOALA_700M)
    arguments = (3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")
    swapped = swap(PatchModelAddDownscale.execute(whole, *arguments).result[0], koala).model
    own_number = next(own[1] for own, there in lineage(KOALA_700M).blocks.items() if there == ("input", 3))
    by_hand = PatchModelAddDownscale.execute(koala, own_number, *arguments[1:]).result[0]
    torch.testing.assert_close(sampled(swapped), sampled(by_hand), rtol=0, atol=0)
    assert not torch.equal(sampled(swapped), sampled(koala))


def test_what_has_no_place_is_dropped_and_said() -> None:
    whole, koala = transfer.pair(KOALA_700M)
    other = whole.clone()
    merged = whole.clone()  # as ModelMergeSimple does it, which takes 20 seconds for one weight after another
    merged.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
    merged.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", lambda executor, *a, **k: executor(*a, **k))
    merged.model_options["torch_compile_kwargs"] = {}
    merged.add_object_patch("diffusion_model.out", torch.nn.Identity())
    merged.set_injections("motion", [object()])
    swapped, report = swap(merged, koala)
    assert not swapped.patches
    assert not swapped.injections
    assert not swapped.object_patches
    assert "torch_compile_kwargs" not in swapped.model_options
    dropped = [line for line in report.splitlines() if line.startswith("dropped: ")]
    assert [line.split(",")[0] for line in dropped] == [
        "dropped: 1680 merged weights",
        "dropped: patched modules of SDXL's U-Net",
        "dropped: torch.compile",
        "dropped: injections (motion modules",
    ]
    torch.testing.assert_close(sampled(swapped), sampled(koala), rtol=0, atol=0)


def test_sdxl_is_let_go(tmp_path: Path) -> None:
    """When the graph gives up the SDXL model, nothing that was swapped keeps it in memory."""
    whole = transfer.model(SMALL_SDXL, transfer.sdxl_weights(), tmp_path)
    patched, _ = comfy.sd.load_lora_for_models(whole, None, attention_lora(), 0.7, 0.0)
    patched = RescaleCFG().patch(ModelSamplingDiscrete().patch(patched, "eps", False)[0], 0.7)[0]
    sampled(patched)
    swapped = swap(patched, transfer.pair(KOALA_700M)[1]).model
    network = weakref.ref(whole.model.diffusion_model)
    comfy.model_management.unload_all_models()
    del whole, patched
    gc.collect()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert network() is None
    assert swapped.patches


def test_only_sdxl_can_be_swapped() -> None:
    whole, koala = transfer.pair(KOALA_700M)
    with pytest.raises(ValueError, match=r"^the MODEL is already a KOALA model \(.*expected SDXL, with text of width"):
        swap(koala, koala)
    stripped = koala.clone()
    stripped.remove_attachments(ATTACHMENT)
    with pytest.raises(ValueError, match=r"^the MODEL is koala-tiny; expected SDXL"):
        swap(stripped, koala)
    with pytest.raises(ValueError, match=r"^the MODEL is an SDXL of other sizes \(text width 2048, 320 channels"):
        swap(transfer.hollow(SDXL), koala)
    with pytest.raises(ValueError, match="this MODEL is not a KOALA model"):
        swap(whole, transfer.hollow(SDXL))
