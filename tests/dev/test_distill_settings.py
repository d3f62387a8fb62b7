"""Settings for memory and speed: each trains as the run without it does, and what cannot be had is refused."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from koala_sdxl.distill import config, optimisers
from koala_sdxl.distill.average import Average
from koala_sdxl.distill.config import TrainingTable
from koala_sdxl.distill.divergence import Finite
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.metrics import Means
from koala_sdxl.distill.teacher import open_teacher
from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, described, pictures, refused, rows, run, same, saved

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)

STEPS = {**SETTINGS["training"], "steps": 4, "checkpoint_every": 2, "keep": 3}
INSTALLED = find_spec(optimisers.PACKAGE) is not None


@pytest.fixture(scope="module")
def plain(place: Path) -> Path:
    """The output folder of a run with none of these settings."""
    run(place, "plain", training=STEPS)
    AcceleratorState._reset_state(reset_partial_state=True)
    return place / "plain"


def numbers(folder: Path) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items()} for row in rows(folder)]


def alike(found: list[dict[str, float]], wanted: list[dict[str, float]], rel: float) -> bool:
    return len(found) == len(wanted) and all(
        row == pytest.approx(other, rel=rel) for row, other in zip(found, wanted, strict=True)
    )


def resumed(place: Path, name: str, tables: dict[str, dict[str, Any]]) -> list[dict[str, float]]:
    """The rows of a finished run that goes on once more from its second step."""
    shutil.rmtree(place / name / "result")
    shutil.rmtree(place / name / "checkpoints" / "step-0000004")
    assert run(place, name, **tables)[0] == "resuming from step 2"
    return numbers(place / name)


# --- the average on the CPU --------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_the_average_on_the_cpu_is_the_same_and_in_fp32(place: Path, plain: Path) -> None:
    run(place, "ema-on-cpu", training={**STEPS, "ema_on_cpu": True})
    assert same(saved(place / "ema-on-cpu"), saved(plain))
    average = Average(nn.Linear(2, 3, dtype=torch.bfloat16), 0.9999, on_cpu=True)
    assert {(weight.device.type, weight.dtype) for weight in average.weights} == {("cpu", torch.float32)}


def test_the_average_of_a_network_on_a_gpu_lies_on_the_cpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        network = nn.Linear(2, 3)
        here, there = Average(network, 0.5), Average(network, 0.5, on_cpu=True)
        for average, device in ((here, "cuda"), (there, "cpu")):
            average.update(1)
            with average.in_place():
                pass
            assert {weight.device.type for weight in average.weights} == {device}
        assert {parameter.device.type for parameter in network.parameters()} == {"cuda"}


# --- layout, compilation, TF32 -----------------------------------------------------------------------------------


@pytest.mark.nightly
def test_channels_last_changes_only_rounding(place: Path, plain: Path) -> None:
    tables = {"training": {**STEPS, "channels_last": True}}
    run(place, "last", **tables)
    whole = numbers(place / "last")
    assert alike(whole, numbers(plain), rel=1e-3)
    assert alike(resumed(place, "last", tables), whole, rel=1e-6)
    weights = load_file(place / "last" / "checkpoints" / "step-0000004" / "average.safetensors")
    assert weights["conv_in.weight"].is_contiguous()


@pytest.mark.nightly
def test_tf32_is_switched_on_and_off(place: Path, plain: Path) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    run(place, "tf32", training={**SETTINGS["training"], "steps": 1, "tf32": True})
    assert torch.backends.cuda.matmul.allow_tf32
    run(place, "no-tf32", training={**SETTINGS["training"], "steps": 1})
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.nightly
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_changes_only_rounding(place: Path, plain: Path, checkpointing: bool) -> None:
    name = f"compiled-{checkpointing}"
    run(place, name, training={**STEPS, "compile": True, "gradient_checkpointing": checkpointing})
    assert alike(numbers(place / name), numbers(plain), rel=1e-3)
    assert load_file(saved(place / name)).keys() == load_file(saved(plain)).keys()


# --- the teacher in fp8 ------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_teacher_in_fp8_takes_half_the_memory_and_answers_alike(place: Path) -> None:
    table = config.read(described(place, "answers", {"teacher": {**SETTINGS["teacher"], "dtype": "fp8"}}))
    whole = open_teacher(table.teacher.model_copy(update={"dtype": "bf16"})).unet()
    teacher = open_teacher(table.teacher)
    small = teacher.in_place(teacher.unet(), torch.device("cpu"))
    sizes = [sum(weight.nbytes for weight in unet.parameters()) for unet in (small, whole)]
    assert sizes[0] < 0.55 * sizes[1]
    assert small.dtype == torch.bfloat16
    run(place, "fp8-cache", training={**SETTINGS["training"], "steps": 1})
    batch = {name: tensor.bfloat16() for name, tensor in pictures(table, [0, 1, 2, 3]).items()}
    conditions = {"text_embeds": batch["pooled"], "time_ids": batch["ids"]}
    answers = [
        unet(batch["latents"], torch.tensor(500), batch["context"], added_cond_kwargs=conditions).sample.float()
        for unet in (small, whole)
    ]
    error = (answers[0] - answers[1]).norm() / answers[1].norm()
    assert 0 < error < 0.1


@pytest.mark.nightly
def test_a_student_is_cut_out_of_the_teacher_before_it_is_rounded_to_fp8(place: Path) -> None:
    for dtype in ("fp8", "bf16"):
        training = {**SETTINGS["training"], "steps": 1, "learning_rate": 1e-12}
        run(place, f"cut-{dtype}", training=training, teacher={"dtype": dtype})
    assert same(saved(place / "cut-fp8"), saved(place / "cut-bf16"))
    rounded, whole = (numbers(place / f"cut-{dtype}")[0] for dtype in ("fp8", "bf16"))
    assert rounded["task"] == whole["task"]
    assert rounded["output"] != whole["output"]
    assert rounded["output"] == pytest.approx(whole["output"], rel=0.2)


# --- AdamW in 8 bits ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
def test_moments_of_8_bits_train_alike_and_resume(place: Path, plain: Path) -> None:
    tables = {"training": {**STEPS, "optimiser": "adamw-8bit"}}
    run(place, "eight-bit", **tables)
    whole = numbers(place / "eight-bit")
    assert alike(whole, numbers(plain), rel=0.05)
    file = Path("checkpoints", "step-0000004", "optimizer.bin")
    sizes = [(folder / file).stat().st_size for folder in (place / "eight-bit", plain)]
    assert sizes[0] < 0.5 * sizes[1]  # small tensors keep moments of 32 bits
    assert alike(resumed(place, "eight-bit", tables), whole, rel=1e-6)


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_moments_of_8_bits_without_a_package_are_refused(place: Path) -> None:
    said = refused(place, "no-package", training={**SETTINGS["training"], "optimiser": "adamw-8bit"})
    assert said.startswith('training.optimiser = "adamw-8bit": the package bitsandbytes is not installed; expected it')
    assert len(said.splitlines()) == 1
    assert not (place / "no-package").exists()


def test_channels_last_is_not_sharded() -> None:
    optimisers.require_installed(TrainingTable(steps=1, channels_last=True), sharded=False)
    with pytest.raises(UserError, match=r"^training\.channels_last does not shard; expected false under FSDP"):
        optimisers.require_installed(TrainingTable(steps=1, channels_last=True), sharded=True)


def test_moments_of_8_bits_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers, "_eight_bit", lambda: torch.optim.AdamW)
    optimisers.require_installed(TrainingTable(steps=1), sharded=True)
    with pytest.raises(UserError, match=r"does not shard; expected \"adamw\" under FSDP"):
        optimisers.require_installed(TrainingTable(steps=1, optimiser="adamw-8bit"), sharded=True)


# --- waiting for the GPU -----------------------------------------------------------------------------------------


def test_a_step_fetches_nothing_from_a_gpu() -> None:
    """A fake tensor has no value: what fetches one fails."""
    means, finite = Means(), Finite()
    with FakeTensorMode():
        for step in range(3):
            errors = {name: torch.ones((), device="cuda") for name in ("task", "output")}
            finite.see(errors, step)
            means.add(errors)
        assert means._added is not None
        assert means._added.device.type == "cuda"
        assert finite.first["task"].device.type == "cuda"
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            means._added[0].item()
