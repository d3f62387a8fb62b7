"""The guide's commands for several GPUs and machines: each is taken from distill/README.md, and starts as written.

What runs here has CPUs in place of GPUs, fewer of them, and both machines are this one.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, described, rows, saved
from tools.harness.testhost import ROOT

place = pytest.fixture(scope="module")(distill_runs.place)

GUIDE = (ROOT / "distill" / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"^(?:torchrun|accelerate launch) .*$", GUIDE, re.MULTILINE)
SBATCH = ROOT / "distill" / "slurm.sbatch"
EACH = 'for task in $(seq "$SLURM_NNODES"); do "$@" & tasks+=($!); done'
STUBS = {
    "srun": f'{EACH}; for task in "${{tasks[@]}}"; do wait "$task"; done',
    "scontrol": "printf 'localhost\\nlocalhost\\n'",
}
"""What SLURM's commands do here: a task for each machine, and the machines' names."""


def groups() -> list[tuple[str, ...]]:
    """The commands that make a run: one, or one for each machine."""
    found: dict[str, tuple[str, ...]] = {}
    for command in COMMANDS:
        if "--nnodes" in command:
            found[command] = (command, command)
        else:
            key = re.sub(r"--machine_rank \d", "", command)
            found[key] = (*found.get(key, ()), command)
    return list(found.values())


def here(command: str, port: int) -> str:
    """A command for two processes on this machine."""
    machines = "--nnodes" in command or "--num_machines" in command
    for many, few in (("16", "2"), ("8", "1" if machines else "2")):
        command = re.sub(rf"(--(?:nproc-per-node|num_processes)) {many}\b", rf"\1 {few}", command)
    return command.replace("HOST", "localhost").replace("29500", str(port))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    """One in which the trainer is installed, and its launchers are; the folder ``distill`` is that of the checkout."""
    installed = place / "site" / "koala_sdxl"
    installed.mkdir(parents=True)
    for name in ("distill", "koala"):
        (installed / name).symlink_to(ROOT / name)
    (place / "distill").symlink_to(ROOT / "distill")
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return distill_runs.ENVIRONMENT | {
        "PYTHONPATH": str(place / "site"),
        "PATH": path,
        "ACCELERATE_USE_CPU": "true",
    }


@pytest.fixture(scope="module")
def wanted(place: Path, environment: dict[str, str]) -> Path:
    """The output folder of the same run by one process, which makes both passes of a step."""
    path = described(place, "one", {"training": {**SETTINGS["training"], "accumulate": 2}})
    command = f"koala-distill {path.name}".replace("koala-distill", f"{sys.executable} -m koala_sdxl.distill")
    ended([subprocess.Popen(shlex.split(command), cwd=place, env=environment, stderr=subprocess.PIPE, text=True)])
    return place / "one"


def ended(running: list[subprocess.Popen[str]]) -> None:
    for process in running:
        complained = process.communicate()[1]
        assert process.returncode == 0, complained[-5000:]


def test_the_guide_has_a_command_for_each_number_of_gpus() -> None:
    assert [len(commands) for commands in groups()] == [1, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_launcher_takes_the_guides_command(command: str) -> None:
    if command.startswith("torchrun"):
        taken = get_args_parser().parse_args(shlex.split(command)[1:])
        assert taken.module
        assert taken.training_script == "koala_sdxl.distill"
    else:
        taken = launch_command_parser().parse_args(shlex.split(command)[2:])
        assert taken.module
        assert taken.training_script == "koala_sdxl.distill"
        settings = yaml.safe_load((ROOT / taken.config_file).read_text())
        assert settings["distributed_type"] == ("FSDP" if "fsdp" in taken.config_file else "MULTI_GPU")
    assert taken.training_script_args == ["CONFIG.toml"]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("commands", [one for one in groups() if "fsdp.yaml" not in one[0]], ids=str)
@pytest.mark.usefixtures("several_processes")
def test_the_guides_commands_start_as_written(
    place: Path, environment: dict[str, str], wanted: Path, commands: tuple[str, ...]
) -> None:
    name, port = f"launched-{groups().index(commands)}", free_port()
    described(place, name, {}).rename(place / "CONFIG.toml")
    given: dict[str, Any] = {"cwd": place, "env": environment, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(["bash", "-c", here(command, port)], **given) for command in commands]
    ended(started)
    assert [row["step"] for row in rows(place / name)] == ["1", "2"]
    for row, alone in zip(rows(place / name), rows(wanted), strict=True):
        assert {key: float(value) for key, value in row.items()} == pytest.approx(
            {key: float(value) for key, value in alone.items()}, rel=1e-3
        )
    assert saved(place / name).exists()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("several_processes")
def test_the_job_for_slurm_starts_as_written(place: Path, environment: dict[str, str], wanted: Path) -> None:
    """Both machines' tasks, by commands that stand for SLURM's own."""
    (place / "bin").mkdir()
    for name, script in STUBS.items():
        (place / "bin" / name).write_text(f"#!/bin/bash\nset -e\n{script}\n")
        (place / "bin" / name).chmod(0o755)
    assert "#SBATCH --nodes=2\n" in SBATCH.read_text()
    path = described(place, "job", {})
    job = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "two"}
    job |= {"SLURM_CPUS_PER_TASK": "32"}
    command = ["bash", "distill/slurm.sbatch", path.name]
    ended([subprocess.Popen(command, cwd=place, env=environment | job, stderr=subprocess.PIPE, text=True)])
    assert len(rows(place / "job")) == len(rows(wanted))
    without = subprocess.run(command[:2], cwd=place, env=environment | job, capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "expected a configuration: sbatch distill/slurm.sbatch CONFIG.toml" in without.stderr
