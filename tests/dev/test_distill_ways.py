"""Every way to run a distillation, and what ends one early."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_sdxl.distill import __main__ as command
from koala_sdxl.distill import build_cache, config, losses, train
from koala_sdxl.distill.buckets import Batches
from koala_sdxl.distill.teacher import Encoder, open_teacher
from koala_sdxl.koala.files.inspect import inspect_model
from tests.dev import distill_runs
from tests.dev.distill_runs import (
    ENVIRONMENT,
    SETTINGS,
    checkpoints,
    described,
    first_weights,
    objective,
    pictures,
    process,
    refused,
    rows,
    run,
    saved,
)

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)


@pytest.fixture(scope="module")
def cached(place: Path) -> Path:
    """The data cache of ``SETTINGS``, which the runs share."""
    table = config.read(described(place, "cached", {}))
    teacher, told = open_teacher(table.teacher), list[str]()
    encoder = Encoder(teacher.pipeline(), torch.device("cpu"))
    build_cache.build(table.data, encoder, teacher.identity, told.append, told.append)
    return table.data.cache


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
    place: Path, cached: Path, tables: dict[str, dict[str, Any]], request: pytest.FixtureRequest
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


def test_sample_grids_are_drawn(place: Path, cached: Path) -> None:
    grids: list[int] = []
    prompts = ["a red circle", "a blue star"]
    table = {"samples_every": 1, "sample_steps": 1, "prompts": prompts}
    run(place, "grids", lambda step, unet: grids.append(step), log=table)
    assert grids == [1, 2]
    assert sorted(path.name for path in (place / "grids" / "samples").iterdir()) == [
        "step-0000001.png",
        "step-0000002.png",
    ]


# --- two processes -----------------------------------------------------------------------------------------------

TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tools.run", "koala_sdxl.distill")
"""accelerate's own launcher starts one process on a CPU, however many it is asked for."""


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("several_processes")
def test_two_processes_train_one_student(place: Path, cached: Path) -> None:
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
        losses.total(
            table.loss,
            made.errors(network, pictures(table, [turn.place for turn in batch]), train._generator(0, number)),
        )
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


# --- what goes wrong ---------------------------------------------------------------------------------------------


def poisoned(place: Path, cached: Path, name: str, index: int) -> Path:
    """A copy of the cache with NaN in one picture's latents."""
    folder = place / name
    shutil.copytree(cached, folder)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["latents"][index, 0, 0, 0] = torch.nan
    save_file(tensors, shard)
    return folder


def test_a_poisoned_picture_ends_the_run_with_step_and_term(place: Path, cached: Path) -> None:
    batches = list(Batches([0] * 12, 2, seed=0, count=6))  # an epoch
    index = batches[4][0].place
    poisoned(place, cached, "poisoned-cache", index)
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
    shutil.copytree(cached, place / "poisoned-cache")
    assert run(place, "poisoned", **tables)[0] == "resuming from step 4"
    assert [row["step"] for row in rows(place / "poisoned")] == ["1", "2", "3", "4", "5", "6"]


def test_a_learning_rate_beyond_reason_ends_the_run(place: Path, cached: Path) -> None:
    said = refused(place, "leap", training={"learning_rate": 1e30, "steps": 3})
    assert said.startswith("step 2: the task error is not finite; training has stopped and there is no checkpoint")


def test_weights_beyond_the_files_range_are_no_result(place: Path, cached: Path) -> None:
    said = refused(place, "beyond", training={"learning_rate": 1e30, "steps": 1, "ema": 0.0})
    assert said.startswith("the result was not written: ")
    assert "holds the value" in said
    assert said.endswith("lower training.learning_rate.")
    assert sorted(path.name for path in (place / "beyond").iterdir()) == ["checkpoints", "config.json", "metrics.csv"]


def test_the_command_ends_with_one_line(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = described(place, "command", {"teacher": {"model": str(tmp_path / "nowhere")}})
    assert command.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("koala-distill: teacher.model: ")
    assert len(err.splitlines()) == 1
