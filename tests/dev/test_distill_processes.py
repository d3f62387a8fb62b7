"""A distillation by several processes: sharded, resumed, with another number, in one folder, and on two machines."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from koala_sdxl.distill import build_cache, config, processes
from koala_sdxl.distill import checkpoints as checkpoints_of_runs
from koala_sdxl.distill.average import Average
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.teacher import Encoder, open_teacher
from koala_sdxl.koala.files.conventions import DISTILLATION_KEY
from tests import large
from tests.dev import distill_runs
from tests.dev.distill_runs import (
    ENVIRONMENT,
    SETTINGS,
    described,
    process,
    refused,
    rows,
    run,
    same,
    saved,
)

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)

LAUNCH = ("torch.distributed.run", "--standalone", "--nproc_per_node")
TRAINER = ("-m", "tools.run", "koala_sdxl.distill")
ON_CPU = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
SHARDED = ENVIRONMENT | {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What accelerate launch makes of distill/fsdp.yaml."""
ON_GLOO = '''
"""The trainer, sharded, on the CPU: accelerate shards on accelerators only, so it is told that it has some."""
import sys
import tools
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
from koala_sdxl.distill import __main__ as command
sys.exit(command.main(sys.argv[1:]))
'''
STEPS = {**SETTINGS["training"], "steps": 4, "checkpoint_every": 2, "ema": 0.9}


def ended(running: subprocess.Popen[str]) -> list[str]:
    """What a run said that has ended well."""
    said, complained = running.communicate()
    assert running.returncode == 0, complained[-5000:]
    return said.splitlines()


@pytest.fixture(scope="module")
def cached(place: Path) -> Path:
    """The data cache, which the runs share."""
    table = config.read(described(place, "cached", {}))
    teacher, told = open_teacher(table.teacher), list[str]()
    encoder = Encoder(teacher.pipeline(), torch.device("cpu"))
    build_cache.build(table.data, encoder, teacher.identity, told.append, told.append)
    return table.data.cache


def stopped(place: Path, whole: Path, name: str, last: str = "step-0000002") -> Path:
    """A run of two processes as it was after a checkpoint, in a folder of another name."""
    folder = place / name
    shutil.copytree(whole / "checkpoints" / last, folder / "checkpoints" / last)
    for file in ("config.json", "metrics.csv"):
        shutil.copy(whole / file, folder / file)
    return folder


# --- the average -------------------------------------------------------------------------------------------------


def test_the_average_moves_where_bf16_would_stand_still() -> None:
    network = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(network.weight)
    average = Average(network, 0.9999)
    average.update(0)
    nn.init.constant_(network.weight, 2.0)
    for step in range(100_000, 100_100):
        average.update(step)
    (weight,) = average.weights
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(2 - 0.9999**100, abs=1e-4)


def test_the_average_is_read_into_place(tmp_path: Path) -> None:
    """Where it is read to is where it lies: on a GPU, or in this process's shard."""
    average, other = (Average(nn.Linear(3, 2), 0.5) for _ in range(2))
    average.save(tmp_path / "average.safetensors", writes=True)
    before = [weight.data_ptr() for weight in other.weights]
    other.load(tmp_path / "average.safetensors")
    assert [weight.data_ptr() for weight in other.weights] == before
    assert all(map(torch.equal, other.weights, average.weights))


def sharded(place: Path, name: str) -> Path:
    """The output folder of a run of two processes, fully_shard, which fill the cache and measure the held-out loss."""
    script = place / "on_gloo.py"
    script.write_text(ON_GLOO)
    tables = {
        "training": {**STEPS, "steps": 2, "checkpoint_every": 1, "precision": "bf16"},
        "data": {**SETTINGS["data"], "cache": "sharded-cache"},
        "validation": {"images": 3, "every": 1},
    }
    environment = SHARDED | {"PYTHONPATH": str(distill_runs.ROOT)}
    with large.alone():
        ended(process(*LAUNCH, "2", str(script), str(described(place, name, tables)), env=environment))
    return place / name


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    """The output folder of a sharded run that nothing ended early."""
    return sharded(place, "sharded")


def held_out(folder: Path) -> list[str]:
    """The rows of the held-out loss."""
    return (folder / "validation.csv").read_text().splitlines()


@pytest.mark.nightly
@pytest.mark.slow
def test_a_sharded_run_shares_the_cache_and_gathers_its_average(place: Path, unbroken: Path) -> None:
    index = json.loads((place / "sharded-cache" / "index.json").read_text())
    assert [shard["count"] for shard in index["shards"]] == [6, 6]  # one of each process
    average = load_file(unbroken / "checkpoints" / "step-0000001" / "average.safetensors")
    assert average.keys() == {tensor.diffusers for tensor, _ in distill_runs.LINE.tensors}
    assert [line.split(",")[0] for line in held_out(unbroken)] == ["step", "1", "2"]
    assert all(tensor.isfinite().all() for tensor in load_file(saved(unbroken)).values())


@pytest.mark.nightly
@pytest.mark.slow
def test_a_sharded_run_goes_on_as_if_nothing_had_been(place: Path, unbroken: Path) -> None:
    """The resumed average is that of the unbroken run, and each process's own shard."""
    stopped(place, unbroken, "sharded-resumed", "step-0000001")
    resumed = sharded(place, "sharded-resumed")
    assert rows(resumed) == rows(unbroken)
    assert held_out(resumed)[-1] == held_out(unbroken)[-1]
    assert same(*(folder / "checkpoints" / "step-0000002" / "average.safetensors" for folder in (resumed, unbroken)))
    assert same(saved(resumed), saved(unbroken))


# --- two processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(place: Path, cached: Path) -> Path:
    """The output folder of an unbroken run of two processes."""
    with large.alone():
        path = described(place, "pair", {"training": STEPS})
        assert ended(process(*LAUNCH, "2", *TRAINER, str(path), env=ON_CPU))[-1] == f"finished: {place / 'pair/result'}"
    return place / "pair"


@pytest.mark.nightly
@pytest.mark.slow
def test_the_result_counts_the_images_of_all_processes(pair: Path) -> None:
    with safe_open(saved(pair), framework="pt") as file:
        assert json.loads(file.metadata()[DISTILLATION_KEY])["images_a_step"] == 2 * 2


@pytest.mark.nightly
@pytest.mark.slow
def test_one_process_goes_on_with_the_same_images(place: Path, pair: Path) -> None:
    folder = stopped(place, pair, "alone")
    said = run(place, "alone", training=STEPS)
    assert (
        "number of processes: 1, forward passes a step on each: 2. A step stays at 4 images, the same ones in the same "
        "order."
    ) in said
    for row, whole in zip(rows(folder), rows(pair), strict=True):
        assert row.keys() == whole.keys()
        assert {key: float(value) for key, value in row.items()} == pytest.approx(
            {key: float(value) for key, value in whole.items()}, rel=1e-3
        )
    with safe_open(saved(folder), framework="pt") as file:
        assert json.loads(file.metadata()[DISTILLATION_KEY])["images_a_step"] == 4


@pytest.mark.parametrize("passes", [0, 3])
def test_a_step_has_all_of_its_passes_whoever_wrote_the_checkpoint(passes: int, tmp_path: Path) -> None:
    """``passes``: how many it had counted, of which each of its steps may have had another number."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.step = passes
    accelerator.save_state(str(tmp_path / "step-0000003"))
    assert checkpoints_of_runs.resume(accelerator, tmp_path, None, lambda _: None) == 3
    synchronised = []
    for _ in range(4):
        with accelerator.accumulate():
            synchronised.append(accelerator.sync_gradients)
    assert synchronised == [False, True, False, True]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_number_of_processes_that_cannot_keep_the_batch_is_refused(place: Path, pair: Path) -> None:
    table = config.read(described(place, "pair", {"training": STEPS}))
    told: list[str] = []
    with pytest.raises(UserError, match=r"^3 processes cannot resume .*step-0000004: its steps are 2 batches of 2; "):
        checkpoints_of_runs.order(table, 3, "data", pair / "checkpoints", told.append)
    checkpoints_of_runs.order(table, 2, "data", pair / "checkpoints", told.append)
    assert told == ["the data cache has changed since step-0000004: from here on the images come in another order."]


# --- one folder --------------------------------------------------------------------------------------------------


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Accelerator(cpu=True)
    processes.require_connected(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^the launcher started 2 processes, but this machine has no GPU"):
        processes.require_connected(alone)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the launcher's processes find GPUs")
def test_a_launcher_without_gpus_starts_no_lone_trainers(place: Path, cached: Path) -> None:
    running = process(*LAUNCH, "2", *TRAINER, str(described(place, "lone", {})))
    complained = running.communicate()[1]
    assert running.returncode != 0
    assert "koala-distill: the launcher started 2 processes, but this machine has no GPU" in complained
    assert not (place / "lone" / "checkpoints").exists()


def test_a_folder_in_use_is_refused_to_a_second_trainer(
    place: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "RELEASE", 0.5)
    with processes.held(Accelerator(cpu=True), place / "used", "output"):
        said = refused(place, "used")
    assert said.startswith(f"output = '{place / 'used'}' is in use by another run; expected a folder that no other run")
    assert list((place / "used").iterdir()) == []
    run(place, "used", training={**SETTINGS["training"], "steps": 1})


def machines(*configurations: Path) -> list[subprocess.Popen[str]]:
    """The processes of a run, one of each machine, started by hand."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    many = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(len(configurations))}
    return [
        process(*TRAINER[1:], str(path), env={**ON_CPU, **many, "RANK": str(rank), "LOCAL_RANK": "0"})
        for rank, path in enumerate(configurations)
    ]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cache", "key"), [("apart", "cache", "output"), ("first", "cache-of-another", "data.cache")]
)
@pytest.mark.usefixtures("several_processes")
def test_machines_with_folders_of_their_own_are_refused(
    place: Path, cached: Path, name: str, cache: str, key: str
) -> None:
    """Two processes as on two machines: what has one path is another folder on each."""
    second = described(place, name, {"data": {**SETTINGS["data"], "cache": cache}}).rename(place / "second.toml")
    first = described(place, "first", {})
    for running in machines(first, second):
        complained = running.communicate()[1]
        assert running.returncode == 1
        lines = [line for line in complained.splitlines() if line.startswith("koala-distill: ")]
        assert len(lines) == 1
        assert lines[0].startswith(f"koala-distill: {key} = ")
        assert "another one for process 1" in lines[0]
        assert "storage that all machines share" in lines[0]
    assert not (place / "first" / "checkpoints").exists()
