"""Distillations that run: sdxl-tiny with random weights into koala-tiny's layout, on a dozen drawings of 64 pixels."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from koala_sdxl.distill import __main__ as command
from koala_sdxl.distill import cache, config, features, losses, result, student, train
from koala_sdxl.distill.buckets import Batches
from koala_sdxl.distill.config import Config
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.objective import Objective
from koala_sdxl.distill.teacher import open_teacher
from koala_sdxl.host.model import model_facts
from koala_sdxl.koala.architecture.keys import renaming, tensors
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.koala.files.conventions import DISTILLATION_KEY, KEPT_TRANSFORMERS_KEY, UNET_PREFIX
from koala_sdxl.koala.files.inspect import inspect_folder, inspect_model
from tools.harness import inprocess, testhost
from tools.harness.testhost import ROOT
from tools.measure import reference
from tools.synthetic import adapters
from tools.synthetic.adapters import RANK
from tools.tiny import SHIPPED, dataset, denoiser, pack, pipeline, text
from tools.tiny.train import SDXL_TINY

State = dict[str, torch.Tensor]
STEPS, EVERY = 10, 2  # of the run that is held against others, and between its checkpoints
LINE = lineage(KOALA_TINY)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SETTINGS: dict[str, dict[str, Any]] = {
    "teacher": {"model": "sdxl-tiny", "dtype": "fp32"},
    "data": {
        "path": "pictures",
        "cache": "cache",
        "resolution": 64,
        "bucket_step": 8,
        "max_aspect": 1.0,
        "workers": 0,
    },
    "training": {"steps": 2, "batch": 2, "learning_rate": 1e-3, "warmup": 1, "ema": 0.5, "precision": "no"},
    "log": {"every": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the teacher and the pictures; configurations lie there, and runs write into it."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = testhost.test_host().tokenizer
    shipped = reference.pipeline(SHIPPED)
    torch.manual_seed(0)
    unet = denoiser.new_unet(SDXL_TINY)
    encoders = text.Encoders(shipped.text_encoder, shipped.text_encoder_2)
    teacher = pipeline.assemble(shipped.vae, encoders, text.tokenizers(tokenizer), unet)
    pipeline.save(teacher, folder / "sdxl-tiny")
    dataset.write(folder / "pictures", 64, 12)
    yield folder
    shutil.rmtree(folder)  # some gigabytes of checkpoints


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    """accelerate keeps its state in the process, and a run is made for a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def described(place: Path, name: str, tables: Mapping[str, dict[str, Any]]) -> Path:
    """A configuration's file: ``SETTINGS`` with these changes. Its output is ``place / name``."""
    lines = [f'output = "{name}"']
    for table in dict.fromkeys((*SETTINGS, *tables)):
        lines += [f"[{table}]"]
        lines += [
            f"{key} = {toml(value)}" for key, value in {**SETTINGS.get(table, {}), **tables.get(table, {})}.items()
        ]
    path = place / f"{name}.toml"
    path.write_text("\n".join(lines), "utf-8")
    return path


def run(place: Path, name: str, watch: train.Watch | None = None, /, **tables: dict[str, Any]) -> list[str]:
    """A run in this process; what it says."""
    said: list[str] = []
    train.run(config.read(described(place, name, tables)), said.append, watch)
    return said


def refused(place: Path, name: str, watch: train.Watch | None = None, /, **tables: dict[str, Any]) -> str:
    with pytest.raises(UserError) as problem:
        run(place, name, watch, **tables)
    assert not (place / name / "result").exists()
    return str(problem.value)


def process(*words: str, **options: Any) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, text=True, **{"env": ENVIRONMENT, **pipes, **options}
    )


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics, without what a clock said."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "images_per_s"} for row in csv.DictReader(file)]


def saved(folder: Path) -> Path:
    return folder / "result" / f"{folder.name}.safetensors"


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def same(first: Path, second: Path) -> bool:
    states = load_file(first), load_file(second)
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


LONG = {"training": {"steps": STEPS, "batch": 4, "checkpoint_every": EVERY}}


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
    assert checkpoints(whole) == ["step-0000008", "step-0000010"]


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


def objective(table: config.Config, network: torch.nn.Module) -> Objective:
    teacher = open_teacher(table.teacher)
    master, pairs = teacher.unet(), features.pairs(LINE, table.loss)
    return Objective(
        table=table.loss,
        dropout=table.data.caption_dropout,
        noise=teacher.noise,
        teacher=master,
        pairs=pairs,
        teacher_features=features.FeatureRecorder(master, (pair.teacher for pair in pairs)),
        student_features=features.FeatureRecorder(network, (pair.student for pair in pairs)),
    )


def pictures(table: config.Config, indices: list[int]) -> State:
    samples = cache.ready(table.data, open_teacher(table.teacher).identity)
    assert samples is not None
    return default_collate([samples[index] for index in indices])


def first_weights(table: config.Config) -> UNet2DConditionModel:
    return student.build(LINE, "teacher", open_teacher(table.teacher).unet(), table.training.seed)


def test_the_loss_on_a_fixed_batch_falls(place: Path, whole: Path) -> None:
    table = config.read(place / "whole.toml")
    before, after = first_weights(table), first_weights(table)
    after.load_state_dict(load_file(whole / "checkpoints" / "step-0000010" / "model.safetensors"))
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


# --- going on ----------------------------------------------------------------------------------------------------


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
    assert "step-0000002" <= last < "step-0000010"
    half = folder / "checkpoints" / ".step-0000010.partial"  # as one that was killed while it wrote
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")

    again = process("tools.run", "koala_sdxl.distill", str(path))
    said, complained = again.communicate()
    assert again.returncode == 0, complained
    assert f"resuming from step {int(last.removeprefix('step-'))}" in said.splitlines()
    assert rows(folder) == rows(whole)
    assert checkpoints(folder) == checkpoints(whole)
    for file in ("checkpoints/step-0000010/model.safetensors", "result/{}.safetensors"):
        assert same(folder / file.format("killed"), whole / file.format("whole"))


def test_a_run_that_missed_its_result_alone_writes_it(place: Path, whole: Path) -> None:
    folder = begun(place, whole, "missed", "step-0000010")
    assert run(place, "missed", **LONG) == ["resuming from step 10", f"finished: {folder / 'result'}"]
    assert rows(folder) == rows(whole)
    assert same(saved(folder), saved(whole))


def test_another_learning_rate_counts_from_where_a_run_goes_on(place: Path, whole: Path) -> None:
    folder = begun(place, whole, "slower", "step-0000008")
    run(place, "slower", training={**LONG["training"], "learning_rate": 1e-5}, log={"every": 1})
    found, before = rows(folder), rows(whole)
    assert found[:8] == before[:8]
    for row, full in zip(found[8:], before[8:], strict=True):
        assert float(row["learning_rate"]) == pytest.approx(float(full["learning_rate"]) / 100)
    assert not same(saved(folder), saved(whole))


def test_what_may_not_change_is_named(place: Path, whole: Path) -> None:
    begun(place, whole, "changed")
    said = refused(place, "changed", training={**LONG["training"], "batch": 3})
    assert said.startswith(f"{place / 'changed'} holds a run with training.batch = 4; now it is 3. ")
    said = refused(place, "changed", **LONG, student={"transformers": "even"})
    assert "holds a run with student.transformers = 'first'; now it is 'even'. " in said
    assert not (place / "changed" / "checkpoints").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"])
def test_a_damaged_checkpoint_is_named(place: Path, whole: Path, file: str) -> None:
    folder = begun(place, whole, f"damaged-{file}", "step-0000010")
    damaged = folder / "checkpoints" / "step-0000010"
    os.truncate(damaged / file, (damaged / file).stat().st_size // 2)
    said = refused(place, folder.name, **LONG)
    assert said.startswith(f"{damaged} cannot be loaded (")
    assert said.endswith("Delete that folder: the run then resumes from the checkpoint before it.")
    shutil.rmtree(folder / "checkpoints")


# --- what goes wrong ---------------------------------------------------------------------------------------------


def poisoned(place: Path, whole: Path, name: str, index: int) -> Path:
    """A copy of the cache with NaN in one picture's latents."""
    folder = place / name
    shutil.copytree(place / "cache", folder)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["latents"][index, 0, 0, 0] = torch.nan
    save_file(tensors, shard)
    return folder


def test_a_poisoned_picture_ends_the_run_with_step_and_term(place: Path, whole: Path) -> None:
    batches = [list(batch) for batch in Batches([0] * 12, 2, seed=0, count=6)]  # an epoch
    index = batches[4][0]
    poisoned(place, whole, "poisoned-cache", index)
    tables: dict[str, dict[str, Any]] = {
        "training": {**SETTINGS["training"], "steps": 6, "checkpoint_every": 2},
        "data": {**SETTINGS["data"], "cache": "poisoned-cache"},
    }
    said = refused(place, "poisoned", **tables)
    last = place / "poisoned" / "checkpoints" / "step-0000004"
    assert said.startswith("step 5: the task error is not finite; training has stopped and the last good state is ")
    assert f"the last good state is {last}. Lower training.learning_rate" in said
    assert checkpoints(place / "poisoned") == ["step-0000002", "step-0000004"]
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())
    assert [row["step"] for row in rows(place / "poisoned")] == ["1", "2", "3", "4"]
    shutil.rmtree(place / "poisoned-cache")
    shutil.copytree(place / "cache", place / "poisoned-cache")
    assert run(place, "poisoned", **tables)[0] == "resuming from step 4"
    assert [row["step"] for row in rows(place / "poisoned")] == ["1", "2", "3", "4", "5", "6"]


def test_a_learning_rate_beyond_reason_ends_the_run(place: Path, whole: Path) -> None:
    said = refused(place, "leap", training={"learning_rate": 1e30, "steps": 3})
    assert said.startswith("step 2: the task error is not finite; training has stopped and there is no checkpoint")


def test_weights_beyond_the_files_range_are_no_result(place: Path, whole: Path) -> None:
    said = refused(place, "beyond", training={"learning_rate": 1e30, "steps": 1, "ema": 0.0})
    assert said.startswith("the result was not written: ")
    assert "holds the value" in said
    assert said.endswith("lower training.learning_rate.")
    assert sorted(path.name for path in (place / "beyond").iterdir()) == ["checkpoints", "config.json", "metrics.csv"]


def test_weights_that_are_no_numbers_are_no_result(place: Path, whole: Path, tmp_path: Path) -> None:
    table = config.read(place / "whole.toml")
    weights = load_file(whole / "checkpoints" / "step-0000010" / "model.safetensors")
    weights["mid"] = weights.pop("conv_out.bias").fill_(torch.nan)
    with pytest.raises(UserError, match=r"^the result was not written: mid of the student is not finite"):
        result.write(table, open_teacher(table.teacher), LINE, weights, tmp_path / "result")
    assert not any(tmp_path.iterdir())


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
        path.name for path in (whole / "checkpoints" / "step-0000010").iterdir()
    }


# --- every way to run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tables",
    [
        {"training": {"gradient_checkpointing": True}, "loss": {"place": "last"}},
        {"training": {"accumulate": 2}, "loss": {"place": "cross-attention", "stage_weights": {"up_blocks.1": 2.0}}},
        {"training": {"ema": 0.0}, "loss": {"place": "residual", "weighting": "min-snr"}},
        {"data": {"caption_dropout": 1.0}, "loss": {"place": "feed-forward", "weighting": "velocity"}},
        {"student": {"layout": "koala-1b", "transformers": "even"}, "loss": {"normalise": True}},
        {"student": {"start": "random"}, "loss": {"place": "none"}, "log": {"to": ["csv", "tensorboard"]}},
        {"training": {"precision": "bf16"}, "teacher": {"dtype": "bf16", "variant": "lightning"}},
    ],
    ids=lambda tables: "-".join(str(value) for table in tables.values() for value in table.values())[:40],
)
def test_every_way_to_run_finishes(
    place: Path, whole: Path, tables: dict[str, dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    name = f"way-{request.node.callspec.indices['tables']}"
    settings = {table: {**SETTINGS.get(table, {}), **changes} for table, changes in tables.items()}
    run(place, name, **settings)
    found = rows(place / name)
    assert [row["step"] for row in found] == ["1", "2"]
    assert all(tensor.isfinite().all() for tensor in load_file(saved(place / name)).values())
    variant = tables.get("teacher", {}).get("variant", "base")
    assert inspect_model(saved(place / name)).identity.variant.name == variant
    features_count = tables.get("loss", {}).get("place") != "none"
    assert (float(found[0]["feature"]) > 0) == features_count
    assert any((place / name).rglob("events.out.*")) == ("tensorboard" in tables.get("log", {}).get("to", ()))
    shutil.rmtree(place / name)


def test_sample_grids_are_drawn(place: Path, whole: Path) -> None:
    grids: list[int] = []
    prompts = ["a red circle", "a blue star"]
    table = {"samples_every": 1, "sample_steps": 1, "prompts": prompts}
    run(place, "grids", lambda step, unet: grids.append(step), log=table)
    assert grids == [1, 2]
    assert sorted(path.name for path in (place / "grids" / "samples").iterdir()) == [
        "step-0000001.png",
        "step-0000002.png",
    ]


def test_an_earlier_student_is_trained_further(place: Path, whole: Path) -> None:
    start = saved(whole)
    rate = {"learning_rate": 1e-9, "steps": 1}
    run(place, "further", student={"start": str(start)}, training=rate)
    assert same(saved(place / "further"), start)  # fp16 does not show so small a step
    with safe_open(saved(place / "further"), framework="pt") as opened:
        assert json.loads(opened.metadata()[DISTILLATION_KEY])["start"] == "whole.safetensors"


# --- teachers ----------------------------------------------------------------------------------------------------


def test_a_single_file_teaches_what_its_folder_teaches(place: Path, whole: Path) -> None:
    unet = load_file(place / "sdxl-tiny" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    names = renaming(SDXL_TINY, "diffusers", "comfy")
    beside = {name: tensor for name, tensor in load_file(SHIPPED).items() if not name.startswith(UNET_PREFIX)}
    save_file(beside | {UNET_PREFIX + names[name]: tensor for name, tensor in unet.items()}, place / "sdxl.safetensors")
    one = {**SETTINGS["training"], "steps": 1}
    run(place, "of-folder", training=one)
    data = {**SETTINGS["data"], "cache": "cache-of-file"}
    tokenizer = str(testhost.test_host().tokenizer)
    run(place, "of-file", teacher={"model": "sdxl.safetensors", "tokenizer": tokenizer}, data=data, training=one)
    pairs = zip(rows(place / "of-folder"), rows(place / "of-file"), strict=True)
    for one_row, other in pairs:
        assert {key: float(value) for key, value in one_row.items()} == pytest.approx(
            {key: float(value) for key, value in other.items()}, rel=1e-3
        )
    first, second = load_file(saved(place / "of-folder")), load_file(saved(place / "of-file"))
    torch.testing.assert_close(first, second, rtol=0, atol=5e-3)


def refused_teacher(place: Path, model: Path | str) -> str:
    return refused(
        place, "untaught", teacher={"model": str(model)}, data={**SETTINGS["data"], "cache": "cache-of-none"}
    )


TEXT_LAYER = "text_model.encoder.layers.1.mlp.fc1"


@pytest.mark.parametrize("naming", ["kohya, diffusers blocks", "kohya, LDM blocks", "diffusers, PEFT"])
def test_loras_are_merged_into_the_teacher(place: Path, tmp_path: Path, naming: str) -> None:
    """Two LoRAs, one after the other, as up x down x alpha / rank on top of each weight."""
    only = ("down_blocks.2.attentions.1.transformer_blocks.9.", "up_blocks.0.attentions.2.proj_in.")
    style, paths, alone = adapters.NAMINGS[naming], [], config.TeacherTable(model=place / "sdxl-tiny", dtype="fp32")
    wanted = open_teacher(alone).unet().state_dict()
    for seed in (1, 2):
        changed = adapters.lora(
            SDXL_TINY,
            "LoRA",
            naming,
            seed,
            lambda tensor: adapters.in_attention(tensor) and tensor.diffusers.startswith(only),
        )
        if "kohya" not in naming:  # it has no alpha: the factor is 1
            changed = {name: value for name, value in changed.items() if not name.endswith(".alpha")}
        for tensor in tensors(SDXL_TINY):
            up, down = (
                style.module(tensor) + style.suffixes.get(end, end) for end in (".lora_up.weight", ".lora_down.weight")
            )
            if tensor.diffusers.endswith(".weight") and up in changed:
                factor = float(changed.get(f"{style.module(tensor)}.alpha", RANK)) / RANK
                wanted[tensor.diffusers] = wanted[tensor.diffusers] + factor * changed[up] @ changed[down]
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file({name: value.contiguous() for name, value in changed.items()}, paths[-1])
    found = open_teacher(alone.model_copy(update={"loras": tuple(paths)})).unet().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in found)


def test_a_loras_text_part_is_merged_too(place: Path, tmp_path: Path) -> None:
    down, up = torch.full((2, 32), 0.1), torch.full((128, 2), 0.5)
    name = f"lora_te1_{TEXT_LAYER.replace('.', '_')}"
    parts = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    whole = adapters.lora(SDXL_TINY, "LoRA", "kohya, diffusers blocks", only=adapters.in_attention)
    save_file({**whole, **parts}, tmp_path / "text.safetensors")
    table = config.TeacherTable(model=place / "sdxl-tiny", dtype="fp32")
    plain, changed = (
        open_teacher(table.model_copy(update={"loras": loras})) for loras in ((), (tmp_path / "text.safetensors",))
    )
    before, after = (teacher.pipeline().text_encoder.state_dict() for teacher in (plain, changed))
    assert before.keys() == after.keys()
    odd = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(odd) == 1
    assert odd[0].endswith("encoder.layers.1.mlp.fc1.weight")
    assert torch.allclose(after[odd[0]] - before[odd[0]], up @ down, atol=1e-6)
    assert changed.identity != plain.identity  # so that other texts are not taken from the cache


def test_what_is_no_lora_is_named(place: Path, tmp_path: Path) -> None:
    save_file(adapters.lora(SDXL_TINY, "LoHa", only=adapters.in_attention), tmp_path / "loha.safetensors")
    for path, why in (
        (tmp_path / "nowhere.safetensors", "does not exist; expected a .safetensors file"),
        (tmp_path / "loha.safetensors", "cannot be merged"),
        (place / "sdxl-tiny" / "unet" / "diffusion_pytorch_model.fp16.safetensors", "cannot be merged"),
    ):
        teacher = {"model": "sdxl-tiny", "dtype": "fp32", "loras": [str(path)]}
        said = refused(place, "with-lora", teacher=teacher)
        assert said.startswith(f"teacher.loras: {path} {why}")


def test_a_student_is_no_teacher(place: Path) -> None:
    assert refused_teacher(place, SHIPPED).startswith(
        f"teacher.model: {SHIPPED} is a koala-tiny; expected all of SDXL's layers"
    )


def test_what_is_no_teacher_is_named(place: Path, tmp_path: Path) -> None:
    said = refused_teacher(place, tmp_path / "nowhere")
    assert said.startswith(f"teacher.model: {tmp_path / 'nowhere'} does not exist; expected SDXL")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    assert "page.safetensors is a web page" in refused_teacher(place, tmp_path / "page.safetensors")
    (tmp_path / "words.safetensors").write_text("these are the weights")
    assert "words.safetensors" in refused_teacher(place, tmp_path / "words.safetensors")
    (tmp_path / "empty").mkdir()
    assert "empty holds no unet/" in refused_teacher(place, tmp_path / "empty")
    assert not (place / "untaught").exists()


@pytest.mark.parametrize("missing", ["text_encoder", "vae", "tokenizer_2", "scheduler", "model_index.json"])
def test_a_teacher_without_its_other_parts_is_named(place: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in (place / "sdxl-tiny").iterdir():
        if path.name != missing:
            (folder / path.name).symlink_to(path)
    said = refused_teacher(place, folder)
    assert said.startswith(f"teacher.model: {folder} is not a complete SDXL folder: ")
    assert not (place / "cache-of-none").exists()


def test_a_teacher_that_predicts_velocity_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "sdxl-tiny", tmp_path / "velocity")
    path = tmp_path / "velocity" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert f"{tmp_path / 'velocity'} says that it predicts v_prediction" in refused_teacher(
        place, tmp_path / "velocity"
    )


@pytest.mark.parametrize(("mark", "metadata"), [("v_pred", {}), ("", {"modelspec.predict_key": "v"})])
def test_a_single_file_that_predicts_velocity_is_named(
    place: Path, tmp_path: Path, mark: str, metadata: dict[str, str]
) -> None:
    state = load_file(place / "sdxl-tiny" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    save_file(state | ({mark: torch.zeros(0)} if mark else {}), path := tmp_path / "velocity.safetensors", metadata)
    assert f"{path} says that it predicts v_prediction" in refused_teacher(place, path)


def test_the_command_ends_with_one_line(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = described(place, "command", {"teacher": {"model": str(tmp_path / "nowhere")}})
    assert command.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("koala-distill: teacher.model: ")
    assert len(err.splitlines()) == 1


# --- two processes -----------------------------------------------------------------------------------------------

TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tools.run", "koala_sdxl.distill")
"""accelerate's own launcher starts one process on a CPU, however many it is asked for."""


@pytest.mark.slow
def test_two_processes_train_one_student(place: Path, whole: Path) -> None:
    """Their first step is that of the mean of both gradients, worked out here."""
    settings = {"training": {"steps": 2, "checkpoint_every": 1, "ema": 0.0}}
    path, folder = described(place, "two", settings), place / "two"
    running = process(*TWO, str(path), env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"})
    said, complained = running.communicate()
    assert running.returncode == 0, complained
    assert said.splitlines().count(f"finished: {folder / 'result'}") == 1
    assert [row["step"] for row in rows(folder)] == ["1", "2"]
    assert checkpoints(folder) == ["step-0000001", "step-0000002"]

    table = config.read(path)
    network = first_weights(table)
    made = objective(table, network)
    batches = list(Batches([0] * 12, 2, seed=0, count=2))
    found = [
        losses.total(table.loss, made.errors(network, pictures(table, batch), train._generator(0, 0, process=number)))
        for number, batch in enumerate(batches)
    ]
    mean = (found[0] + found[1]) / 2
    assert float(rows(folder)[0]["loss"]) == pytest.approx(mean.item(), rel=1e-4)
    first = {name: value.detach().clone() for name, value in network.named_parameters()}
    mean.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), table.training.clip)
    torch.optim.AdamW(network.parameters(), 1e-3, table.training.betas, weight_decay=0.01).step()
    reached = load_file(folder / "checkpoints" / "step-0000001" / "model.safetensors")
    ours = torch.cat([(value.detach() - first[name]).flatten() for name, value in network.named_parameters()])
    theirs = torch.cat([(reached[name] - first[name]).flatten() for name, _ in network.named_parameters()])
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.99
