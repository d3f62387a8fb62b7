"""A student with a layout that is in no table: SDXL's add-ons on it, with and without what its file says it kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from safetensors.torch import save_file

from koala_sdxl import koala_loader
from koala_sdxl.koala.architecture.layout import Layout, compact
from koala_sdxl.koala.architecture.lineage import KeptTransformers, Lineage, attention_depths
from koala_sdxl.koala.files.conventions import KEPT_TRANSFORMERS_KEY
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.nodes.adapt import KoalaAttentionPatches, KoalaControlNet
from koala_sdxl.nodes.load import KoalaModelInfo
from koala_sdxl.nodes.lora import KoalaLoraLoader
from koala_sdxl.nodes.sample import KoalaSampler
from koala_sdxl.nodes.swap import KoalaUNetSwap
from tools.measure import transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL

SHALLOW = transfer.small(compact(3, middle=False))
"""KOALA-700M's blocks with three transformer blocks in the deepest stage."""
DEEP_STAGE = transfer.small(Layout(down=((0,), (2,), (4, 4)), middle=4, up=((4, 4, 4), (2, 2), (0, 0))))
"""One layer fewer than SDXL in all stages but the deepest."""
STUDENTS = {"shallow": SHALLOW, "deep stage": DEEP_STAGE}
SKIPS = {"shallow": (0, 2, 3, 5, 6, 8), "deep stage": (0, 2, 3, 5, 6, 7, 8)}
"""By hand: SDXL's skip that each of the student's is."""
BLOCKS = {
    "shallow": {("input", 5): ("input", 7), ("output", 1): ("output", 2), ("output", 3): ("output", 5)},
    "deep stage": {("input", 5): ("input", 7), ("input", 6): ("input", 8), ("output", 4): ("output", 5)},
}
"""By hand: SDXL's block that some of the student's are."""
KEPT_OF_TEN = {3: (1, 4, 8), 4: (0, 3, 6, 9)}

students = pytest.mark.parametrize("which", STUDENTS)
told_or_not = pytest.mark.parametrize("told", [True, False], ids=["says what it kept", "says nothing"])


def kept(layout: Layout) -> KeptTransformers:
    return {module: KEPT_OF_TEN.get(depth, (0, 1)) for module, depth in attention_depths(layout).items()}


def write(folder: Path, layout: Layout, told: bool = True) -> Path:
    """A student that is cut out of the small SDXL, as the trainer would write it."""
    path = folder / "student.safetensors"
    weights = Lineage(layout, kept(layout)).cut(transfer.sdxl_weights(), "comfy")
    save_file(weights, path, {KEPT_TRANSFORMERS_KEY: json.dumps(kept(layout))} if told else None)
    return path


def student(folder: Path, which: str, told: bool = True) -> Any:
    return koala_loader.load_unet(inspect_model(write(folder, STUDENTS[which], told)), which)


def attention_lora() -> dict[str, torch.Tensor]:
    return adapters.lora(SMALL_SDXL, only=adapters.in_attention)


def sdxl() -> Any:
    return transfer.pair(transfer.KOALAS[0])[0]


def keep(place: tuple[Any, ...]) -> Any:
    def replacement(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        return q

    return replacement


def models(folder: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(folder)], {".safetensors"}))


def run(model: Any, layout: Layout, control: Any = None) -> Any:
    positive = transfer.conditioning(layout, control)
    preset = {"preset": "custom", "steps": 1, "cfg": 1.0, "spacing": "leading"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    return KoalaSampler.execute(model, positive, positive, latent, 0, preset, "euler", 1.0)


def info(model: Any) -> str:
    return KoalaModelInfo.execute(model).result[0]


# --- LoRA ---------------------------------------------------------------------------------------------------------


@students
def test_a_lora_goes_to_the_blocks_that_the_file_names(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path, "loras", monkeypatch)
    save_file(attention_lora(), tmp_path / "some.safetensors")
    found = KoalaLoraLoader.execute(
        student(tmp_path, which), transfer.clip(), "some.safetensors", 0.7, 0.0, "auto", 0.0
    ).result[0]
    changed, _ = comfy.sd.load_lora_for_models(sdxl(), None, attention_lora(), 0.7, 0.0)
    wanted = Lineage(STUDENTS[which], kept(STUDENTS[which])).cut(transfer.baked(changed), "comfy")
    assert transfer.difference(transfer.baked(found), wanted) < transfer.SQUARE_BOUND


def test_a_lora_is_refused_where_nothing_says_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path, "loras", monkeypatch)
    save_file(attention_lora(), tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=r"no table says which of SDXL's transformer blocks the custom .* kept"):
        KoalaLoraLoader.execute(
            student(tmp_path, "shallow", told=False), transfer.clip(), "some.safetensors", 0.7, 0.0, "auto", 0.0
        )


# --- ControlNet ---------------------------------------------------------------------------------------------------


def residuals(model: Any, layout: Layout, control: Any) -> dict[str, list[Any]]:
    with transfer.residuals_seen(control) as seen, transfer.warnings_of_host() as said:
        transfer.sample(model, transfer.conditioning(layout, control))
    assert said == []
    return seen[0]


@students
@told_or_not
def test_residuals_reach_their_layers(which: str, told: bool, tmp_path: Path) -> None:
    control = transfer.hinted(KoalaControlNet.execute(transfer.controlnet()).result[0])
    found = residuals(student(tmp_path, which, told), STUDENTS[which], control)
    wanted = residuals(sdxl(), SMALL_SDXL, transfer.hinted(transfer.controlnet()))
    assert len(found["output"]) == len(SKIPS[which])
    for residual, skip in zip(found["output"], SKIPS[which], strict=True):
        assert torch.equal(residual, wanted["output"][skip])
    assert len(found["middle"]) == (STUDENTS[which].middle is not None)


@students
@told_or_not
def test_koala_sampler_refuses_a_raw_controlnet(which: str, told: bool, tmp_path: Path) -> None:
    model, layout = student(tmp_path, which, told), STUDENTS[which]
    with pytest.raises(ValueError, match=r"ControlNet with SDXL's residuals; custom SDXL sub-network"):
        run(model, layout, transfer.hinted(transfer.controlnet()))
    adapted = KoalaControlNet.execute(transfer.controlnet()).result[0]
    assert run(model, layout, transfer.hinted(adapted)).result[0]["samples"].shape == (1, 4, 16, 16)


# --- attention patches --------------------------------------------------------------------------------------------


@students
def test_an_ip_adapter_is_bound_to_the_blocks_that_the_file_names(which: str, tmp_path: Path) -> None:
    layout, ran = STUDENTS[which], set()
    line = Lineage(layout, kept(layout))

    def patch(place: tuple[Any, ...]) -> Any:
        def replacement(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
            ran.add(place)
            assert (*options["block"], options["block_index"]) == place
            return q

        return replacement

    bound, text = KoalaAttentionPatches.execute(transfer.ip_adapter(student(tmp_path, which), patch)).result
    assert text.startswith(f"{len(transfer.attention_places(layout))} patches remapped to ")
    transfer.sample(bound, transfer.conditioning(layout))
    wanted = {(*line.blocks[block], index) for block, indices in line.attention.items() for index in indices}
    assert ran == wanted
    own = {block: there for block, there in line.blocks.items() if block in BLOCKS[which]}
    assert own == BLOCKS[which]


@students
def test_block_patches_need_no_table(which: str, tmp_path: Path) -> None:
    """Deep Shrink counts blocks, and no transformer blocks."""
    model, layout = student(tmp_path, which, told=False), STUDENTS[which]
    arguments = (2.0, 0.0, 1.0, True, "bicubic", "bicubic")
    bound, text = KoalaAttentionPatches.execute(PatchModelAddDownscale.execute(model, 3, *arguments).result[0]).result
    assert text.startswith("2 patches remapped to ")
    by_hand = PatchModelAddDownscale.execute(model, 2, *arguments).result[0]
    found, wanted, plain = (transfer.sample(each, transfer.conditioning(layout)) for each in (bound, by_hand, model))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert not torch.equal(found, plain)


def test_patches_by_transformer_block_are_refused_where_nothing_says_what_was_kept(tmp_path: Path) -> None:
    model = student(tmp_path, "shallow", told=False)
    with pytest.raises(ValueError, match=r"no table says which of SDXL's transformer blocks the custom .* kept"):
        KoalaAttentionPatches.execute(transfer.ip_adapter(model, keep))
    plain = model.clone()
    plain.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
    with pytest.raises(ValueError, match=r"no table says which of SDXL's transformer blocks the custom .* kept"):
        KoalaAttentionPatches.execute(plain)


@students
@told_or_not
def test_koala_sampler_refuses_sdxls_numbers(which: str, told: bool, tmp_path: Path) -> None:
    model = transfer.ip_adapter(student(tmp_path, which, told), keep)
    with pytest.raises(ValueError, match=r"\d+ attention patches on blocks that custom SDXL sub-network .* lacks"):
        run(model, STUDENTS[which])


@told_or_not
def test_koala_sampler_refuses_patches_on_a_missing_middle(told: bool, tmp_path: Path) -> None:
    model = SelfAttentionGuidance.execute(student(tmp_path, "shallow", told), 0.5, 2.0).result[0]
    with pytest.raises(ValueError, match=r"patches on the middle block, which custom SDXL sub-network .* lacks"):
        run(model, SHALLOW)


# --- U-Net swap ---------------------------------------------------------------------------------------------------


@students
def test_the_swap_carries_a_lora_to_the_blocks_that_the_file_names(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path, "diffusion_models", monkeypatch)
    layout = STUDENTS[which]
    write(tmp_path, layout)
    changed, _ = comfy.sd.load_lora_for_models(sdxl(), None, attention_lora(), 0.7, 0.0)
    swapped = KoalaUNetSwap.execute(changed, "student.safetensors", "default").result[0]
    wanted = Lineage(layout, kept(layout)).cut(transfer.baked(changed), "comfy")
    assert transfer.difference(transfer.baked(swapped), wanted) < transfer.SQUARE_BOUND


@students
def test_the_swap_of_a_plain_sdxl_needs_no_table(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path, "diffusion_models", monkeypatch)
    layout = STUDENTS[which]
    write(tmp_path, layout, told=False)
    swapped, report = KoalaUNetSwap.execute(sdxl(), "student.safetensors", "default").result
    assert report.startswith("custom SDXL sub-network")
    found = transfer.sample(swapped, transfer.conditioning(layout))
    wanted = transfer.sample(student(tmp_path, which, told=False), transfer.conditioning(layout))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    changed, _ = comfy.sd.load_lora_for_models(sdxl(), None, attention_lora(), 0.7, 0.0)
    with pytest.raises(ValueError, match=r"no table says which of SDXL's transformer blocks the custom .* kept"):
        KoalaUNetSwap.execute(changed, "student.safetensors", "default")


# --- KOALA Model Info ---------------------------------------------------------------------------------------------


@students
@told_or_not
def test_model_info_names_incompatible_patches(which: str, told: bool, tmp_path: Path) -> None:
    model = student(tmp_path, which, told)
    assert len(info(model).splitlines()) == 5
    assert "SDXL's numbers" in info(transfer.ip_adapter(model, keep))
    shrunk = PatchModelAddDownscale.execute(model, 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic").result[0]
    assert "SDXL's input 3 is its 2, 4 is its 3, 6 is its 4, 7 is its 5" in info(shrunk)
    stock, _ = comfy.sd.load_lora_for_models(model, None, attention_lora(), 1.0, 0.0)
    if which == "shallow":  # the deep stage's layers have SDXL's numbers and shapes, in part
        assert "load it with KOALA LoRA Loader" in info(stock)
        guided = PerturbedAttentionGuidance.execute(model, 3.0).result[0]
        assert "Perturbed-Attention Guidance: it works on the middle block's attention" in info(guided)
