"""A distillation from its first step to its result, without a break and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from koala_sdxl.distill import config, losses, result
from koala_sdxl.distill.config import Config
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.teacher import open_teacher
from koala_sdxl.host.model import model_facts
from koala_sdxl.koala.architecture.keys import renaming
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files.conventions import DISTILLATION_KEY, KEPT_TRANSFORMERS_KEY, UNET_PREFIX
from koala_sdxl.koala.files.inspect import inspect_folder, inspect_model
from tests.daily import daily
from tests.dev import distill_runs
from tests.dev.distill_runs import (
    LINE,
    checkpoints,
    described,
    first_weights,
    objective,
    pictures,
    process,
    refused,
    rows,
    run,
    same,
    saved,
)
from tools.harness import inprocess
from tools.tiny import pack, pipeline

STEPS, EVERY = 6, 2  # of the run that is held against others, and between its checkpoints
LONG = {"training": {"steps": STEPS, "batch": 4, "checkpoint_every": EVERY}}

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The output folder of an unbroken run."""
    running = process("tools.run", "koala_sdxl.distill", str(described(place, "whole", LONG)))
    said, complained = running.communicate()
    assert running.returncode == 0, complained
    assert said.splitlines()[-1] == f"finished: {place / 'whole' / 'result'}"
    return place / "whole"


def begun(place: Path, whole: Path, name: str, *kept: str) -> Path:
    """The unbroken run as it was before its end, with these of its checkpoints, in a folder of another name."""
    folder = place / name
    for file in ("config.json", "metrics.csv"):
        folder.mkdir(exist_ok=True)
        shutil.copy(whole / file, folder / file)
    for checkpoint in kept:
        shutil.copytree(whole / "checkpoints" / checkpoint, folder / "checkpoints" / checkpoint)
    return folder


# --- a whole run -------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should(place: Path, whole: Path) -> None:
    found = rows(whole)
    assert [row["step"] for row in found] == [str(step) for step in range(1, STEPS + 1)]
    assert list(found[0]) == ["step", "loss", "task", "output", "feature", "learning_rate"]
    for row in found:
        terms = [float(row[term]) for term in ("task", "output", "feature")]
        assert min(terms) > 0
        assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-5)
    assert float(found[0]["learning_rate"]) == 1e-3
    assert Config.model_validate(json.loads((whole / "config.json").read_text())) == config.read(place / "whole.toml")
    assert sorted(path.name for path in whole.iterdir()) == ["checkpoints", "config.json", "metrics.csv", "result"]
    assert sorted(path.name for path in (whole / "result").iterdir()) == ["whole", "whole.safetensors"]
    assert checkpoints(whole) == ["step-0000004", "step-0000006"]


def test_the_result_is_finite_and_moved_from_the_teacher(place: Path, whole: Path) -> None:
    unet = load_file(whole / "result" / "whole" / "unet" / "diffusion_pytorch_model.safetensors")
    teacher = open_teacher(config.read(place / "whole.toml").teacher).file.weights(torch.float16)
    first = LINE.cut(teacher, "diffusers")
    assert unet.keys() == first.keys()
    assert all(tensor.isfinite().all() for tensor in unet.values())
    assert all(tensor.dtype == torch.float16 for tensor in unet.values())
    moved = [name for name in unet if not torch.equal(unet[name], first[name])]
    assert len(moved) > 0.95 * len(unet)  # a bias of zeros may round to itself
    assert 1e-4 < max(float((unet[name].float() - first[name].float()).abs().max()) for name in unet) < 0.1


def test_the_loss_on_a_fixed_batch_falls(place: Path, whole: Path) -> None:
    table = config.read(place / "whole.toml")
    before, after = first_weights(table), first_weights(table)
    after.load_state_dict(load_file(whole / "checkpoints" / "step-0000006" / "model.safetensors"))
    batch, found = pictures(table, list(range(12))), []
    for network in (before, after):
        with torch.no_grad():
            found.append(objective(table, network).errors(network, batch, torch.Generator().manual_seed(7)))
    assert float(losses.total(table.loss, found[1])) < 0.9 * float(losses.total(table.loss, found[0]))
    assert all(found[1][term] < found[0][term] for term in ("task", "feature"))


def test_diffusers_loads_the_folder(whole: Path) -> None:
    made = StableDiffusionXLPipeline.from_pretrained(whole / "result" / "whole", torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    pictured = pipeline.pictures(made, ["a red circle"], size=64, steps=2)
    assert pictured.shape == (1, 3, 64, 64)
    assert pictured.isfinite().all()


def test_the_pack_loads_folder_and_file_with_equal_weights(whole: Path) -> None:
    inprocess.activate()
    from koala_sdxl import koala_loader

    folder, file = whole / "result" / "whole", saved(whole)
    loaded = koala_loader.load_folder(folder), koala_loader.load_checkpoint(file)
    nets = [model.model.diffusion_model.state_dict() for model, _, _ in loaded]
    assert nets[0].keys() == nets[1].keys()
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert [asdict(model_facts(model).layout) for model, _, _ in loaded] == [asdict(KOALA_TINY)] * 2
    assert [model_facts(model).identity.variant.name for model, _, _ in loaded] == ["base", "base"]
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    renamed, state = renaming(KOALA_TINY, "diffusers", "comfy"), load_file(file)
    assert all(torch.equal(tensor, state[UNET_PREFIX + renamed[name]]) for name, tensor in unet.items())


def test_both_say_what_they_are_made_of(place: Path, whole: Path) -> None:
    folder, file = whole / "result" / "whole", saved(whole)
    assert inspect_model(file).identity.variant.name == "base"
    assert inspect_folder(folder).model.identity.variant.name == "base"
    for path in (file, folder / "unet" / "diffusion_pytorch_model.safetensors"):
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        assert metadata["koala.variant"] == "base"
        assert json.loads(metadata[KEPT_TRANSFORMERS_KEY]) == {
            module: list(kept) for module, kept in LINE.transformers.items()
        }
        assert json.loads(metadata[DISTILLATION_KEY]) == {
            "layout": "koala-tiny",
            "teacher": "sdxl-tiny",
            "loras": [],
            "start": "teacher",
            "steps": STEPS,
            "images_a_step": 4,
            "loss": config.read(place / "whole.toml").loss.model_dump(mode="json"),
        }


def test_the_built_in_models_file_would_say_it_too(whole: Path) -> None:
    said = pack.metadata(whole / "result" / "whole")
    assert json.loads(said[DISTILLATION_KEY])["steps"] == STEPS
    assert said["modelspec.title"] == "koala-tiny"
    assert json.loads(said["koala.training"]).keys() == {"autoencoder", "text"}  # no recipe of a U-Net


def test_a_finished_run_is_left_as_it_is(place: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert run(place, "whole", **LONG) == [f"{whole / 'result'} exists already; nothing to do."]
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_weights_that_are_no_numbers_are_no_result(place: Path, whole: Path, tmp_path: Path) -> None:
    table = config.read(place / "whole.toml")
    weights = load_file(whole / "checkpoints" / "step-0000006" / "model.safetensors")
    weights["mid"] = weights.pop("conv_out.bias").fill_(torch.nan)
    with pytest.raises(UserError, match=r"^the result was not written: mid of the student is not finite"):
        result.write(table, open_teacher(table.teacher), LINE, weights, tmp_path / "result", images_a_step=4)
    assert not any(tmp_path.iterdir())


# --- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("several_processes")
def test_a_killed_run_goes_on_as_if_nothing_had_been(place: Path, whole: Path) -> None:
    path, folder = described(place, "killed", LONG), place / "killed"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = process("tools.run", "koala_sdxl.distill", str(path), **quiet)
    deadline = time.monotonic() + 300
    while not (folder / "metrics.csv").exists() or len(rows(folder)) < 3:
        assert running.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "the run makes no steps"
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not (folder / "result").exists()
    last = max(name for name in checkpoints(folder) if name.startswith("step-"))
    assert "step-0000002" <= last < "step-0000006"
    half = folder / "checkpoints" / ".step-0000006.partial"  # as one that was killed while it wrote
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")

    again = process("tools.run", "koala_sdxl.distill", str(path))
    said, complained = again.communicate()
    assert again.returncode == 0, complained
    assert f"resuming from step {int(last.removeprefix('step-'))}" in said.splitlines()
    assert rows(folder) == rows(whole)
    assert checkpoints(folder) == checkpoints(whole)
    for file in ("checkpoints/step-0000006/model.safetensors", "result/{}.safetensors"):
        assert same(folder / file.format("killed"), whole / file.format("whole"))


def test_a_run_that_missed_its_result_alone_writes_it(place: Path, whole: Path) -> None:
    folder = begun(place, whole, "missed", "step-0000006")
    assert run(place, "missed", **LONG) == ["resuming from step 6", f"finished: {folder / 'result'}"]
    assert rows(folder) == rows(whole)
    assert same(saved(folder), saved(whole))


def test_another_learning_rate_counts_from_where_a_run_goes_on(place: Path, whole: Path) -> None:
    folder = begun(place, whole, "slower", "step-0000004")
    run(place, "slower", training={**LONG["training"], "learning_rate": 1e-5}, log={"every": 1})
    found, before = rows(folder), rows(whole)
    assert found[:4] == before[:4]
    for row, full in zip(found[4:], before[4:], strict=True):
        assert float(row["learning_rate"]) == pytest.approx(float(full["learning_rate"]) / 100)
    assert not same(saved(folder), saved(whole))


def test_what_may_not_change_is_named(place: Path, whole: Path) -> None:
    begun(place, whole, "changed")
    said = refused(place, "changed", training={**LONG["training"], "batch": 3})
    assert said.startswith(f"{place / 'changed'} holds a run with training.batch = 4; now it is 3. ")
    said = refused(place, "changed", **LONG, student={"transformers": "even"})
    assert "holds a run with student.transformers = 'first'; now it is 'even'. " in said
    assert not (place / "changed" / "checkpoints").exists()


@pytest.mark.parametrize(
    "file",
    daily(
        ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "average.safetensors"],
        ["model.safetensors", "optimizer.bin"],
    ),
)
def test_a_damaged_checkpoint_is_named(place: Path, whole: Path, file: str) -> None:
    folder = begun(place, whole, f"damaged-{file}", "step-0000006")
    damaged = folder / "checkpoints" / "step-0000006"
    os.truncate(damaged / file, (damaged / file).stat().st_size // 2)
    said = refused(place, folder.name, **LONG)
    assert said.startswith(f"{damaged} cannot be loaded (")
    assert said.endswith("Delete that folder: the run then resumes from the checkpoint before it.")
    shutil.rmtree(folder / "checkpoints")


def test_an_earlier_student_is_trained_further(place: Path, whole: Path) -> None:
    start = saved(whole)
    rate = {"learning_rate": 1e-9, "steps": 1}
    run(place, "further", student={"start": str(start)}, training=rate)
    assert same(saved(place / "further"), start)  # fp16 does not show so small a step
    with safe_open(saved(place / "further"), framework="pt") as opened:
        assert json.loads(opened.metadata()[DISTILLATION_KEY])["start"] == "whole.safetensors"


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 420 MB of its own, as the folder ``small-disk`` beside the configurations."""
    folder = place / "small-disk"
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=420m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(("spare", "foreseen"), [(-4096, True), (16384, False)], ids=["foreseen", "while writing"])
def test_a_full_disk_leaves_the_checkpoint_before(
    place: Path, whole: Path, small_disk: Path, spare: int, foreseen: bool
) -> None:
    """The disk is filled after the second step: to less than a checkpoint's weights, and to a little more."""

    def fill(step: int, unet: UNet2DConditionModel) -> None:
        need = 16 * sum(parameter.numel() for parameter in unet.parameters()) + spare
        free = shutil.disk_usage(small_disk).free
        with (small_disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - need)

    said = refused(
        place,
        "small-disk",
        fill,
        training={"steps": 4, "checkpoint_every": 2},
        log={"samples_every": 2, "sample_steps": 1},
    )
    saves = small_disk / "checkpoints"
    assert said.startswith(f"{saves / 'step-0000004'} could not be written: ")
    assert (" GB needed, " in said) == foreseen
    assert said.endswith(f"The last checkpoint is {saves / 'step-0000002'}. Free space and run again.")
    assert [path.name for path in saves.iterdir()] == ["step-0000002"]
    state = load_file(saves / "step-0000002" / "model.safetensors")
    assert state.keys() == {part.diffusers for part, _ in LINE.tensors}
    assert {path.name for path in (saves / "step-0000002").iterdir()} == {
        path.name for path in (whole / "checkpoints" / "step-0000006").iterdir()
    }
