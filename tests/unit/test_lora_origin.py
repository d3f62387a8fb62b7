"""Which model a LoRA was trained on, where its file holds more or less than one model's modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from koala_sdxl.koala.architecture.keys import Tensor, tensors
from koala_sdxl.koala.architecture.layout import KOALA_TINY, SSD_1B, VEGA, Layout
from koala_sdxl.koala.architecture.lineage import at_widths_of
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.lora.plan import Plan, inspect_lora
from koala_sdxl.koala.lora.report import report
from tests.unit.translatable import english_only
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL, State

UNKNOWN = {
    "OneTrainer": {f"bundle_emb.style.{name}": torch.ones(4, 64) for name in ("clip_l", "clip_g")},
    "one LoRA module": {f"unet.my_own.lora_{part}.weight": torch.ones(4, 4) for part in ("A", "B")},
}
DIFFUSERS = "kohya, diffusers blocks"


def small(layout: Layout) -> Layout:
    return at_widths_of(KOALA_TINY, layout)


def plan(folder: Path, state: State, metadata: dict[str, str] | None = None) -> Plan:
    save_file(state, folder / "some.safetensors", metadata)
    return inspect_lora(folder / "some.safetensors", KOALA_TINY)


def said(found: Plan) -> tuple[str, str]:
    assert found.origin is not None
    assert english_only(report(found, "none")) == []
    return found.origin.model, found.origin.evidence


def of(*places: str) -> Callable[[Tensor], bool]:
    """The attention matrices in any of these places, and the convolutions."""
    return lambda tensor: tensor.diffusers.startswith(places) and len(tensor.shape) > 1


@pytest.mark.parametrize("unknown", UNKNOWN)
@pytest.mark.parametrize("naming", [DIFFUSERS, "kohya, LDM blocks"])
def test_unknown_tensors_do_not_change_the_origin(unknown: str, naming: str, tmp_path: Path) -> None:
    state = adapters.lora(KOALA_TINY, naming=naming, only=adapters.in_attention) | UNKNOWN[unknown]
    found = plan(tmp_path, state)
    assert said(found) == ("koala-tiny", "it has exactly koala-tiny's transformer blocks")
    assert found.count("applied") == sum(map(adapters.in_attention, tensors(KOALA_TINY)))
    with pytest.raises(CheckpointError, match="is a LoRA for SSD-1B"):
        plan(tmp_path, adapters.lora(small(SSD_1B), only=adapters.in_attention) | UNKNOWN[unknown])


def test_a_tensor_of_a_known_module_does_not_change_it_either(tmp_path: Path) -> None:
    state = adapters.lora(KOALA_TINY, naming="diffusers, PEFT", only=adapters.in_attention)
    module = "unet.down_blocks.1.attentions.0.proj_in"
    found = plan(tmp_path, state | {f"{module}.lora_B.bias": torch.ones(64)})
    assert said(found)[0] == "koala-tiny"
    assert found.count("applied") == sum(map(adapters.in_attention, tensors(KOALA_TINY)))
    damaged = plan(tmp_path, state | {f"{module}.lora_B.weight": torch.ones(64, 3)})
    assert said(damaged)[0] == "koala-tiny"
    assert (damaged.count("malformed"), damaged.count("applied")) == (1, found.count("applied") - 1)


def test_a_shape_that_only_the_target_has_proves_it(tmp_path: Path) -> None:
    only = of("up_blocks.0.resnets.1", "up_blocks.0.attentions.1.proj", "up_blocks.1.attentions.1.transformer_blocks.0")
    state = adapters.lora(KOALA_TINY, "LoCon", DIFFUSERS, only=only)
    found = plan(tmp_path, state)
    model, evidence = said(found)
    assert model == "koala-tiny"
    assert evidence.startswith("it has a shape that SDXL lacks, such as lora_unet_up_blocks_0_resnets_1_conv")
    assert found.count("applied") == len(found.modules) == sum(map(only, tensors(KOALA_TINY)))


@pytest.mark.parametrize(("layout", "name"), [(SSD_1B, "SSD-1B"), (VEGA, "Segmind Vega")])
def test_layers_that_koala_lacks_do_not_prove_sdxl_where_relatives_have_them(
    layout: Layout, name: str, tmp_path: Path
) -> None:
    state = adapters.lora(small(layout), only=of("down_blocks.2.attentions.1.transformer_blocks.1"))
    model, evidence = said(
        plan(tmp_path, state | adapters.lora(SMALL_SDXL, only=of("down_blocks.2.attentions.0.proj")))
    )
    assert model == "SDXL"
    assert evidence.startswith("assumed: it has layers that koala-tiny lacks, such as lora_unet_input_blocks_7_1_")
    assert name in evidence
    assert evidence.endswith("would fit, too")


def test_layers_that_sdxl_alone_has_prove_it(tmp_path: Path) -> None:
    model, evidence = said(plan(tmp_path, adapters.lora(SMALL_SDXL, only=adapters.in_attention)))
    assert (model, "assumed" in evidence) == ("SDXL", False)


@pytest.mark.parametrize(
    ("metadata", "model", "words"),
    [
        ({}, "SDXL", "assumed, as koala-tiny has all of its layers, too; choose KOALA if that is wrong"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL", 'assumed (its metadata says "sdxl_base_v1-0"), as'),
        ({"ss_sd_model_name": "koala-700m.safetensors"}, "koala-tiny", 'its metadata says "koala-700m.safetensors"'),
        ({"modelspec.architecture": "koala-700m/lora"}, "koala-tiny", 'its metadata says "koala-700m/lora"'),
        (
            {"lora_adapter_metadata": '{"unet.r": 2, "unet.base_model_name_or_path": "etri-vilab/koala-700m"}'},
            "koala-tiny",
            'its metadata says "etri-vilab/koala-700m"',
        ),
    ],
)
def test_metadata_decide_where_the_layers_do_not(
    metadata: dict[str, str], model: str, words: str, tmp_path: Path
) -> None:
    state = adapters.lora(SMALL_SDXL, naming=DIFFUSERS, only=of("up_blocks.1.attentions.0.transformer_blocks.0"))
    found = said(plan(tmp_path, state, metadata))
    assert found[0] == model
    assert found[1].startswith(words)


def test_metadata_of_a_relative_are_believed(tmp_path: Path) -> None:
    state = adapters.lora(small(SSD_1B), only=of("down_blocks.2.attentions.1.transformer_blocks.1"))
    with pytest.raises(CheckpointError, match=r'is a LoRA for SSD-1B \(its metadata says "segmind/SSD-1B"\)'):
        plan(tmp_path, state, {"ss_sd_model_name": "segmind/SSD-1B"})


@pytest.mark.parametrize("outer", ["", "text_model."])
def test_a_lora_of_one_text_encoder_is_named(outer: str, tmp_path: Path) -> None:
    module = f"base_model.model.{outer}encoder.layers.0.mlp.fc1"
    with pytest.raises(CheckpointError, match=r"^some\.safetensors is a LoRA of a CLIP text encoder, and its names do"):
        plan(tmp_path, {f"{module}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"})
