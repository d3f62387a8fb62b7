"""What is said of a LoRA: which file, what to do about a damaged one, and which of its modules change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files.conventions import CARRY_KEY
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.lora.kinds import UP
from koala_sdxl.koala.lora.plan import inspect_lora
from koala_sdxl.koala.lora.report import report
from koala_sdxl.koala.lora.weights import load
from tests.unit.test_lora_modules import GOOD, MODULE, WIDTH, header, lora, ones, peft, planned, write
from tools.synthetic.adapters import State


def test_a_damaged_file_is_to_be_fetched_again(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(1 incomplete; .* Fetch the file again, or leave this LoRA out\.$"):
        planned(tmp_path, {MODULE + UP: ones(WIDTH, 4)})
    removed = {GOOD.replace("blocks_4_", "blocks_5_") + part: ones(WIDTH, WIDTH) for part in (UP, ".lora_down.weight")}
    with pytest.raises(CheckpointError, match=r"\(1 malformed, 1 removed .* Fetch the file again"):
        planned(tmp_path, peft() | removed, header(r=8))
    with pytest.raises(CheckpointError, match=r"\(1 of another shape; .*, or use it on the model that it was made for"):
        planned(tmp_path, {MODULE + UP: ones(8, 4), MODULE + ".lora_down.weight": ones(4, 8)}, trained_on="SDXL")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_name_that_every_adapter_has_is_told_with_its_folder(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, lora()).rename(tmp_path / name)
    assert inspect_lora(path, KOALA_TINY).file == f"{tmp_path.name}/{name}"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"^{tmp_path.name}/{name} is empty"):
        inspect_lora(path, KOALA_TINY)


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("lora_te2_text_projection", "clip_g.transformer.text_projection"),
        ("lora_te1_text_model_final_layer_norm", "clip_l.transformer.text_model.final_layer_norm"),
        (
            "text_encoders.clip_g.transformer.text_model.embeddings.token_embedding",
            "clip_g.transformer.text_model.embeddings.token_embedding",
        ),
    ],
)
def test_what_lies_outside_the_layers_is_known_without_the_text_encoders(
    tmp_path: Path, module: str, target: str
) -> None:
    """As core saves differences of text encoders ("Save LoRA"), and OneTrainer projections: for a hook, too."""
    (found,) = planned(tmp_path, {f"{module}.diff": ones(8)}).text
    assert (found.outcome, found.target) == ("applied", f"text_encoders.{target}")


IDLE: dict[str, State] = {
    "LoRA": lora() | {MODULE + UP: torch.zeros(WIDTH, 4)},
    "fp8": {
        name: tensor.to(torch.float8_e4m3fn) for name, tensor in (lora() | {MODULE + UP: torch.zeros(WIDTH, 4)}).items()
    },
    "LoHa": {
        f"{MODULE}.hada_w{n}_{part}": torch.zeros(WIDTH, WIDTH) if n == 2 else ones(WIDTH, WIDTH)
        for n in (1, 2)
        for part in "ab"
    },
    "weight difference": {MODULE + ".diff": torch.zeros(WIDTH, WIDTH)},
}


@pytest.mark.parametrize("kind", IDLE)
def test_zeros_are_applied_and_said_to_change_nothing(tmp_path: Path, kind: str) -> None:
    """As an untrained LoRA has them, and kohya's in CLIP-L's last layer, which SDXL does not use."""
    plan = load(planned(tmp_path, IDLE[kind] | lora(GOOD))).plan
    assert plan.count("applied") == 2
    assert f"applied: {MODULE}: its numbers are zeros, so it changes nothing" in report(plan, "none").splitlines()


def test_zeros_beside_which_something_changes_are_not_said_to_change_nothing(tmp_path: Path) -> None:
    module = "unet.down_blocks.1.attentions.0.proj_in"
    for beside in ({f"{module}.lora_magnitude_vector": ones(WIDTH)}, {f"{module}.lora_B.bias": ones(WIDTH)}):
        state = peft(module) | {f"{module}.lora_B.weight": torch.zeros(WIDTH, 4)} | beside
        assert "zeros" not in report(load(planned(tmp_path, state)).plan, "none")


def test_an_alpha_of_zero_in_a_configuration_is_said_to_change_nothing(tmp_path: Path) -> None:
    plan = load(planned(tmp_path, peft(), header(r=4, lora_alpha=0))).plan
    assert "its numbers are zeros, so it changes nothing" in report(plan, "none")


@pytest.mark.parametrize(("stored", "width"), [("F4", 1), ("F6_E2M3", 3), ("C64", 8), ("F8_E8M0", 1), ("BOOL", 1)])
@pytest.mark.parametrize("suffix", [".alpha", ".reshape_weight"])
def test_single_numbers_of_any_type_end_in_words(tmp_path: Path, suffix: str, stored: str, width: int) -> None:
    """Of all that the safetensors library takes, whether PyTorch can read it or not."""
    path = write(tmp_path, lora() | lora(GOOD) | {MODULE + suffix: torch.zeros(4 * width, dtype=torch.uint8)})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table[MODULE + suffix] |= {"dtype": stored, "shape": [{"F4": 8, "F6_E2M3": 16}.get(stored, 4)]}
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    (found,) = (module for module in inspect_lora(path, KOALA_TINY).modules if module.name == MODULE)
    assert (found.outcome, suffix[1:] in found.reason) == ("malformed", True)


def test_what_a_lora_was_learned_from_is_said(tmp_path: Path) -> None:
    told = {"lora": {"name": "paint.safetensors"}, "way": "fit", "shares": {"lineage": 0.4, "fit": 0.8125}}
    lines = report(planned(tmp_path, lora(), {CARRY_KEY: json.dumps(told)}), "none").splitlines()
    assert "learned from paint.safetensors: 81 % of its change of SDXL" in lines
    assert not [line for line in lines if line.startswith("way: ")]


@pytest.mark.parametrize("told", ["", "[]", "{}", '{"lora": 1}', '{"lora": {"name": "x"}, "way": "fit", "shares": {}}'])
def test_metadata_that_cannot_be_read_are_not(tmp_path: Path, told: str) -> None:
    assert planned(tmp_path, lora(), {CARRY_KEY: told}).learned is None
