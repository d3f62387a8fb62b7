"""Modules of a LoRA file that make no change, are of another kind, or have their strength elsewhere, each by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.lora.kinds import ALPHA, OTHER_KINDS, UP
from koala_sdxl.koala.lora.modules import Module
from koala_sdxl.koala.lora.plan import Plan, inspect_lora
from koala_sdxl.koala.lora.report import report, text_summary
from koala_sdxl.koala.lora.weights import load
from tests.unit.translatable import english_only
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL, State

ones = torch.ones
MODULE = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
PEFT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
GOOD = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"
WIDTH = 64
"""Rows and columns of both modules on koala-tiny."""


def write(folder: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "some.safetensors", metadata)
    return folder / "some.safetensors"


def lora(module: str = MODULE, rank: int = 4, up: str = UP, down: str = ".lora_down.weight") -> State:
    return {module + up: ones(WIDTH, rank), module + down: ones(rank, WIDTH)}


def peft(module: str = f"base_model.model.{PEFT}", rank: int = 4) -> State:
    return lora(module, rank, ".lora_B.weight", ".lora_A.weight")


def planned(folder: Path, state: State, metadata: dict[str, str] | None = None, **options: Any) -> Plan:
    return inspect_lora(write(folder, state, metadata), KOALA_TINY, **options)


def become(folder: Path, state: State, **options: Any) -> Module:
    """What becomes of MODULE beside one that is right."""
    plan = planned(folder, state | lora(GOOD), **options)
    (found,) = (module for module in plan.modules if module.name == MODULE)
    return found


# --- incomplete, malformed, unsupported ---------------------------------------------------------------------------

FAULTY: dict[str, tuple[Callable[[], State], str, str]] = {
    "no up": (lambda: {MODULE + ".lora_down.weight": ones(4, WIDTH)}, "incomplete", "it lacks lora_up.weight"),
    "alpha alone": (lambda: {MODULE + ALPHA: torch.tensor(4.0)}, "incomplete", "it has alpha only"),
    "half a LoHa": (
        lambda: {MODULE + ".hada_w1_a": ones(WIDTH, 4), MODULE + ".hada_w1_b": ones(4, WIDTH)},
        "incomplete",
        "it lacks hada_w2_a, hada_w2_b",
    ),
    "ranks": (
        lambda: lora() | {MODULE + UP: ones(WIDTH, 8)},
        "malformed",
        f"its tensors do not go together: lora_down.weight [4, {WIDTH}], lora_up.weight [{WIDTH}, 8]",
    ),
    "scalar": (lambda: lora() | {MODULE + UP: torch.tensor(1.0)}, "malformed", "its tensors do not go together"),
    "empty": (
        lambda: {MODULE + UP: ones(WIDTH, 0), MODULE + ".lora_down.weight": ones(0, WIDTH)},
        "malformed",
        "is empty",
    ),
    "integers": (
        lambda: lora() | {MODULE + UP: ones(WIDTH, 4, dtype=torch.int8)},
        "malformed",
        "lora_up.weight is I8, not floating point",
    ),
    "alpha of two": (lambda: lora() | {MODULE + ALPHA: ones(2)}, "malformed", "alpha is F32 [2], not one number"),
    "alpha of many": (lambda: lora() | {MODULE + ALPHA: ones(99)}, "malformed", "alpha is F32 [99], not one number"),
    "alpha NaN": (lambda: lora() | {MODULE + ALPHA: torch.tensor(math.nan)}, "malformed", "alpha is nan"),
    "alpha bool": (lambda: lora() | {MODULE + ALPHA: torch.tensor(True)}, "malformed", "alpha is BOOL []"),
    "reshape": (
        lambda: lora() | {MODULE + ".reshape_weight": torch.tensor([10**6, 10**6])},
        "malformed",
        f"reshape_weight is [1000000, 1000000], and the layer is [{WIDTH}, {WIDTH}]",
    ),
    "magnitudes": (
        lambda: lora() | {MODULE + ".dora_scale": ones(3, 1)},
        "malformed",
        f"dora_scale is [3, 1], and the layer is [{WIDTH}, {WIDTH}]",
    ),
    "no bias": (
        lambda: lora() | {MODULE + ".diff_b": ones(WIDTH)},
        "malformed",
        "it has diff_b, and the layer has no bias",
    ),
    "two kinds": (
        lambda: lora() | {MODULE + ".diff": ones(WIDTH, WIDTH)},
        "malformed",
        "tensors of several kinds (diff, lora_down.weight, lora_up.weight)",
    ),
    "AdaLoRA": (lambda: lora() | {MODULE + ".lora_E": ones(4, 1)}, "unsupported", "AdaLoRA (lora_E)"),
    "unknown sibling": (lambda: lora() | {MODULE + ".gate.weight": ones(4)}, "unsupported", "unknown tensor gate"),
    "modules_to_save": (lambda: {MODULE + ".weight": ones(WIDTH, WIDTH)}, "unsupported", "a whole weight or bias"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY)
def test_what_is_wrong_with_a_module_is_said(tmp_path: Path, fault: str) -> None:
    state, outcome, reason = FAULTY[fault]
    found = become(tmp_path, state())
    assert (found.outcome, reason in found.reason) == (outcome, True), found.reason
    plan = planned(tmp_path, state() | lora(GOOD))
    assert not [name for name in plan.names if name.startswith(MODULE)]
    assert f"{MODULE}: {found.reason}" in report(plan, "none")
    assert english_only(report(plan, text_summary(plan))) == []
    with pytest.raises(CheckpointError, match=r"^some\.safetensors(: none of its 1 modules can be| holds Ada| is an )"):
        planned(tmp_path, state())


def test_numbers_that_are_not_finite_are_found_when_they_are_read(tmp_path: Path) -> None:
    state = lora() | {MODULE + UP: torch.full((WIDTH, 4), math.inf)}
    loaded = load(planned(tmp_path, state | lora(GOOD)))
    found = {module.name: module for module in loaded.plan.modules}
    assert (found[MODULE].outcome, found[GOOD].outcome) == ("malformed", "applied")
    assert found[MODULE].reason == "lora_up.weight has numbers that are not finite"
    assert {name.rpartition(".lora_")[0] for name in loaded.unet if "lora_" in name} == {found[GOOD].target}
    with pytest.raises(CheckpointError, match=r"none of its 1 modules can be applied .* not finite"):
        load(planned(tmp_path, state))


def test_tensors_are_copied_out_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, lora())
    tensors = load(inspect_lora(path, KOALA_TINY)).unet
    path.write_bytes(bytes(path.stat().st_size))
    assert all(bool((tensor == 1).all()) for name, tensor in tensors.items() if "lora_" in name)


def test_two_modules_of_one_layer_are_not_both_counted(tmp_path: Path) -> None:
    again = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    plan = planned(tmp_path, lora() | lora(again))
    assert sorted(module.outcome for module in plan.modules) == ["applied", "malformed"]
    reason = next(module.reason for module in plan.modules if module.reason)
    assert reason.startswith("it changes the same layer as lora_unet_")


def test_two_adapters_in_one_file_are_told_apart(tmp_path: Path) -> None:
    state = lora(PEFT, 4, ".lora_B.first.weight", ".lora_A.first.weight")
    assert planned(tmp_path, state).count("applied") == 1
    with pytest.raises(CheckpointError, match="two tensors for lora_"):
        planned(tmp_path, state | lora(PEFT, 4, ".lora_B.second.weight", ".lora_A.second.weight"))


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        ("oft_R.weight", "PEFT's OFT"),
        ("boft_R", "PEFT's BOFT"),
        ("vera_lambda_b", "VeRA"),
        ("hra_u", "HRA"),
        ("ia3_l", "IA3"),
        ("bone_block", "Bone"),
        ("miss_block", "MiSS"),
        ("fourierft_spectrum", "FourierFT"),
        ("ln_tuning_layers.weight", "LN Tuning"),
        ("randlora_lambda", "RandLora"),
        ("lora_embedding_A", "a LoRA of an embedding"),
        ("on_input", "LyCORIS's IA3"),
        ("lambda_layer", "T-LoRA"),
    ],
)
def test_kinds_that_comfyui_does_not_apply_are_refused_by_name(tmp_path: Path, suffix: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^some\.safetensors holds {name}, which ComfyUI cannot apply"):
        planned(tmp_path, {f"base_model.model.{PEFT}.{suffix}": ones(4, 4)})


def test_every_other_kind_has_a_name() -> None:
    assert len({name for _, name in OTHER_KINDS}) == len(OTHER_KINDS)


def test_an_adapter_of_an_unknown_kind_is_not_called_a_lora(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        planned(tmp_path, {f"{MODULE}.lora_up.foo": ones(4, 4)})
    said = str(caught.value)
    assert said.startswith("some.safetensors is an adapter of an unknown kind (1 tensors, first: lora_unet_input")
    assert "is a LoRA" not in said


def test_a_whole_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^some\.safetensors is an SDXL-family U-Net; expected a LoRA"):
        planned(tmp_path, adapters.unet(SMALL_SDXL))


# --- names --------------------------------------------------------------------------------------------------------

PREFIX = "model.diffusion_model."
LDM = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "module",
    [
        *(outer + name for name in (LDM, PEFT) for outer in ("", "unet.", "diffusion_model.", PREFIX)),
        *(f"base_model.model.{prefix}{name}" for prefix in ("", "unet.", "diffusion_model.") for name in (LDM, PEFT)),
        *(f"{prefix}{name.replace('.', '_')}" for prefix in ("lora_unet_", "lycoris_") for name in (LDM, PEFT)),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("up", "down"),
    [
        (UP, ".lora_down.weight"),
        (".lora_B.weight", ".lora_A.weight"),
        (".lora_B.my_style.weight", ".lora_A.my_style.weight"),
        (".lora_B", ".lora_A"),
        (".lora.up.weight", ".lora.down.weight"),
        ("_lora.up.weight", "_lora.down.weight"),
    ],
)
def test_every_prefix_goes_with_every_numbering_and_suffix(tmp_path: Path, module: str, up: str, down: str) -> None:
    (found,) = planned(tmp_path, lora(module, 4, up, down)).modules
    assert (found.outcome, found.target) == ("applied", f"diffusion_model.{LDM.replace('4', '3', 1)}")


ENCODERS = {"clip_l": ("text_encoder.", "lora_te1_"), "clip_g": ("text_encoder_2.", "lora_te2_")}


@pytest.mark.parametrize("outer", ["text_model.", ""], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_text_encoders_of_both_transformers(tmp_path: Path, encoder: str, outer: str) -> None:
    dotted, flat = ENCODERS[encoder]
    name = f"{outer}encoder.layers.3.mlp.fc1"
    for module in (dotted + name, flat + name.replace(".", "_"), f"base_model.model.{dotted}{name}"):
        for state in (lora(module), peft(module), lora(module, 4, ".lora_linear_layer.up.weight", ".lora_A.weight")):
            (found,) = planned(tmp_path, state).text
            target = f"text_encoders.{encoder}.transformer.text_model.encoder.layers.3.mlp.fc1"
            assert (found.outcome, found.target) == ("applied", target)


@pytest.mark.parametrize("name", [".lora_magnitude_vector", ".lora_magnitude_vector.default.weight", ".dora_scale"])
def test_dora_of_text_encoders_is_dora(tmp_path: Path, name: str) -> None:
    magnitudes = ones(WIDTH, 1) if "scale" in name else ones(WIDTH)
    plan = planned(tmp_path, peft(TEXT) | {TEXT + name: magnitudes})
    tensors = load(plan).text
    assert tensors[f"{plan.text[0].target}.dora_scale"].shape == (WIDTH, 1)


def test_peft_magnitudes_of_a_convolution_get_the_weights_dimensions(tmp_path: Path) -> None:
    module = "unet.down_blocks.1.resnets.0.conv2"
    state = {
        f"{module}.lora_A.weight": ones(2, 64, 3, 3),
        f"{module}.lora_B.weight": ones(64, 2, 1, 1),
        f"{module}.lora_magnitude_vector": ones(1, 64, 1, 1),
    }
    (tensor,) = (value for name, value in load(planned(tmp_path, state)).unet.items() if name.endswith("dora_scale"))
    assert tensor.shape == (64, 1, 1, 1)


def test_text_modules_are_counted_not_their_tensors(tmp_path: Path) -> None:
    layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    shapes = {f"clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.{kind}": (64, 64)[: 2 - n] for n, kind in
              enumerate(("weight", "bias"))}  # fmt: skip
    state = {f"{layer}.diff": ones(64, 64), f"{layer}.diff_b": ones(64), "lora_te1_nothing.diff": ones(4)}
    plan = planned(tmp_path, state, text=shapes)
    assert text_summary(plan) == "1 of 2 applied, 1 unknown"


# --- strength -----------------------------------------------------------------------------------------------------


def alpha_over_rank(folder: Path, state: State, metadata: dict[str, str] | None = None) -> float:
    """The factor with which ComfyUI would multiply up times down."""
    (module,) = planned(folder, state, metadata).applied
    ((_, alpha),) = module.numbers.items()
    return alpha / 4


def header(**config: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 1}, 0.25),
        ({"r": 4, "lora_alpha": 4, "use_rslora": True}, 2.0),
        ({"r": 16, "lora_alpha": 4, "rank_pattern": {"attn1.to_q": 4}}, 1.0),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {f"^{PEFT}": 6}}, 1.5),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_.": 12, "attn1.to_q": 6}}, 3.0),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_k": 12}}, 1.0),
    ],
)
def test_strength_is_what_diffusers_metadata_say(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    state = lora(f"unet.{PEFT}", 4, ".lora.up.weight", ".lora.down.weight")
    assert alpha_over_rank(tmp_path, state, header(**config)) == scale
    plan = planned(tmp_path, state, header(**config))
    assert "strength: alpha and rank as its metadata says" in report(plan, "none")


def test_each_text_encoder_has_its_own_metadata(tmp_path: Path) -> None:
    stated = {"unet.r": 4, "unet.lora_alpha": 4, "text_encoder.r": 4, "text_encoder.lora_alpha": 8}
    metadata = {"lora_adapter_metadata": json.dumps(stated)}
    assert alpha_over_rank(tmp_path, peft(TEXT), metadata) == 2.0
    assert alpha_over_rank(tmp_path, peft(TEXT.replace("encoder.", "encoder_2.", 1)), metadata) == 1.0


@pytest.mark.parametrize("others", [False, True])
def test_pefts_configuration_beside_the_file_counts(tmp_path: Path, others: bool) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = write(tmp_path, peft())
    if others:  # in a folder of many LoRAs it may be any one's, unless the file has PEFT's name
        save_file(peft(), tmp_path / "other.safetensors")
        (module,) = inspect_lora(path, KOALA_TINY).applied
        assert (list(module.numbers.values()), module.assumed) == ([4.0], True)
        path = path.rename(tmp_path / "adapter_model.safetensors")
    plan = inspect_lora(path, KOALA_TINY)
    assert list(plan.applied[0].numbers.values()) == [16.0]
    assert "as adapter_config.json says" in report(plan, "none")


def test_an_unknown_alpha_is_said(tmp_path: Path) -> None:
    plan = planned(tmp_path, peft())
    assert "strength: alpha is unknown for 1 module, taken to be the rank (scale 1)" in report(plan, "none")
    with_alpha = planned(tmp_path, lora() | {MODULE + ALPHA: torch.tensor(2.0)}, header(r=4, lora_alpha=8))
    assert list(with_alpha.applied[0].numbers.values()) == [2.0], "an alpha of the file's own counts first"


def test_a_lokr_of_whole_factors_is_scaled_too(tmp_path: Path) -> None:
    state = {f"unet.{PEFT}.lokr_w1": ones(8, 8), f"unet.{PEFT}.lokr_w2": ones(8, 8)}
    tensors = load(planned(tmp_path, state, header(r=4, alpha=2, peft_type="LOKR"))).unet
    assert sorted(float(tensor.flatten()[0]) for tensor in tensors.values()) == [0.5, 1.0]


def test_a_bias_of_peft_is_scaled_as_the_weight(tmp_path: Path) -> None:
    module = "unet.down_blocks.1.attentions.0.proj_in"
    state = peft(module) | {f"{module}.lora_B.bias": ones(WIDTH)}
    tensors = load(planned(tmp_path, state, header(r=4, lora_alpha=8))).unet
    assert [float(tensor[0]) for name, tensor in tensors.items() if name.endswith(".diff_b")] == [2.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
        ('{"unet.r": 0}', "its metadata says r: 0; expected ranks from 1 on"),
        ('{"unet.r": 4, "unet.lora_alpha": NaN}', "says lora_alpha: nan; expected a finite number"),
        ('{"unet.r": "4"}', "says r: 4; expected a finite number"),
        ('{"unet.r": 4, "unet.rank_pattern": {"to_q": null}}', "says rank_pattern"),
        ('{"unet.r": 4, "unet.alpha_pattern": {"(": 4}}', "in alpha_pattern; expected a module's name"),
        ('{"unet.r": 4, "unet.alpha_pattern": {"(a*)*b": 4}}', "in alpha_pattern; expected a module's name"),
        ('{"unet.r": 4, "unet.init_lora_weights": "pissa_niter_4"}', "is a PiSSA adapter"),
        ('{"unet.r": 4, "unet.use_qalora": true}', "is a QALoRA adapter"),
        ('{"unet.r": 8}', "its rank is 4, its metadata says 8"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=r"^some\.safetensors") as caught:
        planned(tmp_path, peft(f"unet.{PEFT}"), {"lora_adapter_metadata": text})
    assert words in str(caught.value)
