"""LoRA files read by their headers: which model they are for, and which KOALA layer each module goes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from koala_sdxl.koala.architecture.keys import Tensor, tensors
from koala_sdxl.koala.architecture.layout import (
    KOALA_1_7B,
    KOALA_1B,
    KOALA_700M,
    KOALA_TINY,
    SSD_1B,
    VEGA,
    Layout,
    name,
)
from koala_sdxl.koala.architecture.lineage import at_widths_of, lineage
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.lora.kinds import UP
from koala_sdxl.koala.lora.names import find
from koala_sdxl.koala.lora.plan import Plan, inspect_lora
from koala_sdxl.koala.lora.report import report
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL, State

Write = Callable[[State], Path]


def small(layout: Layout) -> Layout:
    return at_widths_of(KOALA_TINY, layout)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(state: State, metadata: dict[str, str] | None = None) -> Path:
        save_file(state, tmp_path / "some.safetensors", metadata)
        return tmp_path / "some.safetensors"

    return written


def plan(state: State, write: Write, target: Layout = KOALA_TINY, **options: object) -> Plan:
    return inspect_lora(write(state), target, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("koala", "naming"),
    [
        *((KOALA_700M, naming) for naming in adapters.NAMINGS),
        *((koala, "kohya, LDM blocks") for koala in (KOALA_1B, KOALA_1_7B)),
        *(
            pytest.param(koala, naming, marks=pytest.mark.nightly)
            for koala in (KOALA_1B, KOALA_1_7B)
            for naming in adapters.NAMINGS
            if naming != "kohya, LDM blocks"
        ),
    ],
    ids=lambda part: part if isinstance(part, str) else name(part),
)
def test_every_naming_reaches_every_layer_that_was_kept(naming: str, koala: Layout, write: Write) -> None:
    state = adapters.lora(SMALL_SDXL, "LoRA", naming, only=adapters.in_attention)
    made = plan(state, write, small(koala))
    line = lineage(small(koala))
    style = adapters.NAMINGS[naming]
    up = style.suffixes.get(UP, UP)
    wanted = {
        style.module(whole) + up: f"diffusion_model.{part.comfy.removesuffix('.weight')}{UP}"
        for part, whole in line.tensors
        if adapters.in_attention(part)
    }
    assert {old: new for old, new in made.names.items() if old.endswith(up)} == wanted
    assert made.count("applied") == len(wanted) == sum(map(adapters.in_attention, tensors(koala)))
    assert made.count("removed") == 722 - len(wanted)
    assert made.count("mismatch") == made.count("unknown") == 0


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_every_kind_is_recognised_by_shape(kind: str, write: Write) -> None:
    made = plan(adapters.lora(SMALL_SDXL, kind), write)
    kept = [part for part, _ in lineage(KOALA_TINY).tensors if part.diffusers.endswith(".weight")]
    assert made.count("applied") == sum(map(adapters.KINDS[kind].fits, kept))
    assert made.count("mismatch") == made.count("unknown") == 0


@pytest.mark.parametrize("kind", [kind for kind in adapters.KINDS if kind != "norms"])
def test_a_module_of_another_shape_is_counted_and_left_out(kind: str, write: Write) -> None:
    state = adapters.lora(SMALL_SDXL, kind)
    # a layer that both have, with the shape of a wider one
    odd = next(part for part, whole in lineage(KOALA_TINY).tensors if adapters.KINDS[kind].fits(part) and part == whole)
    module = adapters.NAMINGS["kohya, LDM blocks"].module(odd)
    wider = (*(2 * size for size in odd.shape[:2]), *odd.shape[2:])
    parts = adapters.KINDS[kind].parts(wider, lambda *shape: torch.ones(shape))
    state |= {module + suffix: value for suffix, value in parts.items()}
    made = plan(state, write)
    assert made.count("mismatch") == 1
    assert not any(old.startswith(module) for old in made.names)


@pytest.mark.parametrize("koala", [KOALA_700M, KOALA_1B], ids=name)
@pytest.mark.parametrize("naming", ["kohya, LDM blocks", "diffusers, PEFT"])
def test_a_lora_trained_on_koala_goes_on_as_it_is(koala: Layout, naming: str, write: Write) -> None:
    target = small(koala)
    state = adapters.lora(target, naming=naming, only=adapters.in_attention)
    made = plan(state, write, target)
    assert made.origin is not None
    assert made.origin.layout == target
    assert made.count("applied") == len(made.modules) == sum(map(adapters.in_attention, tensors(koala)))
    style = adapters.NAMINGS[naming]
    for tensor in filter(adapters.in_attention, tensors(target)):
        up = style.suffixes.get(".lora_up.weight", ".lora_up.weight")
        assert made.names[style.module(tensor) + up].startswith(
            f"diffusion_model.{tensor.comfy.removesuffix('.weight')}."
        )


def in_decoder(tensor: Tensor) -> bool:
    """A part of SDXL that KOALA has by name, too: its second attention module came from SDXL's third, though."""
    return tensor.diffusers.startswith(("up_blocks.1.attentions.0.", "up_blocks.1.attentions.1.")) and (
        adapters.in_attention(tensor)
    )


def test_a_small_lora_is_taken_for_sdxls_unless_it_is_told_otherwise(write: Write) -> None:
    state = adapters.lora(SMALL_SDXL, naming="kohya, diffusers blocks", only=in_decoder)
    made = plan(state, write)
    assert made.origin is not None
    assert made.origin.evidence.startswith("assumed, as koala-tiny has all of its layers, too")
    assert made.origin.layout == SMALL_SDXL
    told = plan(state, write, trained_on="KOALA")
    assert told.origin is not None
    assert (told.origin.layout, told.origin.evidence) == (KOALA_TINY, "as chosen")
    assert (made.count("applied"), told.count("applied")) == (22, 44)


def test_what_told_sdxl_is_said(write: Write) -> None:
    made = plan(adapters.lora(SMALL_SDXL, only=adapters.in_attention), write)
    assert made.origin is not None
    assert made.origin.evidence.startswith("it has layers that koala-tiny lacks, such as lora_unet_input_")


def test_a_shape_that_only_sdxl_has_tells_it(write: Write) -> None:
    def second_resnet(tensor: Tensor) -> bool:
        return tensor.diffusers == "up_blocks.0.resnets.1.conv1.weight"

    state = adapters.lora(SMALL_SDXL, "LoCon", "kohya, diffusers blocks", only=in_decoder)
    state |= adapters.lora(SMALL_SDXL, "LoCon", "kohya, diffusers blocks", only=second_resnet)
    made = plan(state, write)
    assert made.origin is not None
    assert made.origin.evidence == "its lora_unet_up_blocks_0_resnets_1_conv1 has the shape of SDXL's"
    assert (made.count("applied"), made.count("removed")) == (22, 23)  # the middle one of three, in both


def test_removed_transformer_blocks_are_folded_into_the_nearest_kept_one(write: Write) -> None:
    state = adapters.lora(SMALL_SDXL, naming="SGM", only=adapters.in_attention)
    made = plan(state, write, fold=True)
    assert (made.count("applied"), made.count("folded"), made.count("removed")) == (222, 150, 350)
    # blocks 5 to 9 of three modules all go to block 4: five changes for each place, never two in one map
    assert len(made.folds) == 5
    goals = [[module.target for module in modules] for modules in made.folds]
    assert all(len(found) == len(set(found)) for found in goals)
    assert all(".transformer_blocks.4." in goal for found in goals for goal in found)
    first = "diffusion_model.output_blocks.2.1.transformer_blocks.5.attn1.to_q"
    folded = next(module for module in made.folds[0] if module.name == first)
    assert folded.target == "diffusion_model.output_blocks.1.1.transformer_blocks.4.attn1.to_q"


def test_changes_that_are_no_sums_are_not_folded(write: Write) -> None:
    made = plan(adapters.lora(SMALL_SDXL, "DoRA", only=adapters.in_attention), write, fold=True)
    assert made.count("folded") == 0
    assert made.count("removed") == 500


def test_text_encoders_keep_their_names(write: Write) -> None:
    state = adapters.lora(SMALL_SDXL, only=adapters.in_attention) | adapters.text_lora(2, 32, 128)
    made = plan(state, write)
    assert [module.outcome for module in made.text] == 12 * ["applied"]
    assert made.text[0].target == "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    assert len(made.modules) == 722
    only_text = plan(adapters.text_lora(2, 32, 128), write)
    assert only_text.origin is None
    assert not only_text.names


def test_unknown_modules_are_counted_by_name(write: Write) -> None:
    state = adapters.lora(SMALL_SDXL, only=adapters.in_attention)
    state["lora_unet_my_own_layer.lora_up.weight"] = torch.ones(4, 2)
    made = plan(state, write)
    assert made.count("unknown") == 1
    assert "unknown modules: lora_unet_my_own_layer" in report(made, "none")


def test_the_report_counts_by_stage(write: Write) -> None:
    said = report(plan(adapters.lora(SMALL_SDXL, only=adapters.in_attention), write), "none").splitlines()
    assert said[0] == "some.safetensors"
    assert said[1].startswith("trained on SDXL: it has layers that koala-tiny lacks, such as ")
    assert said[2] == "U-Net on koala-tiny: 222 applied, 500 removed with KOALA's missing layers"
    assert said[3].startswith("way: each change on its own layer.")
    assert said[4:] == [
        "text encoders: none",
        "  down 2: 22 applied, 22 removed with KOALA's missing layers",
        "  down 3: 52 applied, 152 removed with KOALA's missing layers",
        "  middle: 102 removed with KOALA's missing layers",
        "  up 1: 104 applied, 202 removed with KOALA's missing layers",
        "  up 2: 44 applied, 22 removed with KOALA's missing layers",
    ]


def test_every_module_is_found_by_its_names() -> None:
    for tensor in tensors(SMALL_SDXL):
        if tensor.diffusers.endswith(".weight"):
            for naming in adapters.NAMINGS.values():
                assert find(SMALL_SDXL, naming.module(tensor)) == tensor


# --- what cannot be used ------------------------------------------------------------------------------------------


def refused(state: State, write: Write, target: Layout = KOALA_TINY) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(state, write, target)
    return str(caught.value)


def sd15(width: int = 768) -> State:
    """Some modules of a LoRA for Stable Diffusion 1.5 (or 2.x): SDXL's names, another text width, one stage more."""
    state: State = {}
    for block in ("down_blocks_0_attentions_0", "down_blocks_1_attentions_0", "up_blocks_1_attentions_0"):
        for module, columns in (("attn1_to_q", 640), ("attn2_to_k", width), ("attn2_to_v", width)):
            prefix = f"lora_unet_{block}_transformer_blocks_0_{module}"
            state |= {
                f"{prefix}.lora_up.weight": torch.ones(640, 4),
                f"{prefix}.lora_down.weight": torch.ones(4, columns),
            }
    return state


def flat(*modules: str) -> State:
    return {f"{module}.lora_{end}.weight": torch.ones(4, 4) for module in modules for end in ("up", "down")}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (sd15(), "a LoRA for Stable Diffusion 1.x (text width 768, not 2048)"),
        (sd15(1024), "a LoRA for Stable Diffusion 2.x (text width 1024, not 2048)"),
        (flat("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_3_linear1"), "a LoRA for Flux"),
        (flat("transformer.single_transformer_blocks.0.attn.to_q"), "a LoRA for Flux"),
        (flat("diffusion_model.joint_blocks.0.x_block.attn.qkv"), "a LoRA for Stable Diffusion 3"),
        (flat("transformer.transformer_blocks.0.img_mod.1"), "a LoRA for Qwen-Image"),
        (flat("diffusion_model.blocks.0.cross_attn.k"), "a LoRA for Wan"),
        (flat("lora_unet_some_thing_else"), "a LoRA for an unknown model (none of its 1 modules is SDXL's"),
    ],
    ids=["SD 1.5", "SD 2.1", "Flux kohya", "Flux diffusers", "SD 3", "Qwen-Image", "Wan", "unknown"],
)  # fmt: skip
def test_loras_of_other_families_are_named(state: State, words: str, write: Write) -> None:
    said = refused(state, write, KOALA_700M)
    assert said.startswith("some.safetensors is ")
    assert words in said
    assert "expected a LoRA for SDXL or for KOALA-700M" in said


@pytest.mark.parametrize(
    ("layout", "words"),
    [(SSD_1B, "SSD-1B"), (VEGA, "Segmind Vega"), (KOALA_1B, "KOALA-1B"), (KOALA_1_7B, "KOALA-1.7B")],
)
@pytest.mark.parametrize("naming", ["kohya, LDM blocks", "diffusers"])
def test_loras_of_sdxls_other_relatives_are_named(layout: Layout, words: str, naming: str, write: Write) -> None:
    only = lambda tensor: adapters.in_attention(tensor) and ".to_" in tensor.diffusers  # noqa: E731
    said = refused(adapters.lora(small(layout), naming=naming, only=only), write)
    assert f"some.safetensors is a LoRA for {words} (it has exactly its transformer blocks)" in said


def test_files_that_are_no_lora_are_named(write: Write, tmp_path: Path) -> None:
    assert "is a VAE; expected a LoRA" in refused({"decoder.conv_in.weight": torch.ones(4, 4, 3, 3)}, write)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(write(adapters.lora(SMALL_SDXL, only=in_decoder)).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"^broken\.safetensors is cut short"):
        inspect_lora(broken, KOALA_TINY)
    broken.write_bytes(b"PK\x03\x04 something")
    with pytest.raises(CheckpointError, match=r"is a pickle .* expected a \.safetensors file of a LoRA"):
        inspect_lora(broken, KOALA_TINY)


def test_nothing_to_apply_is_an_error(write: Write) -> None:
    gone = adapters.lora(
        SMALL_SDXL, only=lambda tensor: tensor.diffusers.startswith("mid_block") and adapters.in_attention(tensor)
    )
    said = refused(gone, write)
    assert said.startswith("some.safetensors: none of its 102 modules can be applied to koala-tiny (102 removed with")
