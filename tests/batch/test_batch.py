"""A table of forty rows by two workers: each picture once, bit for bit one server's, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.batch.conftest import (
    HEADER,
    PROMPTS,
    ROWS,
    WORKFLOW,
    Job,
    batch,
    has_each_once,
    started,
    wait_for,
    write_table,
)
from tools.harness import testhost
from tools.harness.client import Prompt
from tools.harness.server import free_port

pytestmark = [pytest.mark.nightly, pytest.mark.slow]
OneByOne = dict[tuple[str, int], bytes]
ON_CORES = (
    "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); os.execv(sys.argv[2], sys.argv[2:])"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_table(tmp_path_factory.mktemp("table") / "rows.csv", ROWS)


@pytest.fixture(scope="module")
def whole(table: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job, run to its end."""
    status, said, job = batch(tmp_path_factory.mktemp("whole"), str(WORKFLOW), table)
    assert status == 0, said
    assert "Rows done: 40 of 40" in said
    return job


def test_forty_rows_are_those_of_one_server(whole: Job, one_by_one: OneByOne) -> None:
    has_each_once(whole, one_by_one)
    for entry in whole.manifest():
        content = (whole.out / entry["files"][0]).read_bytes()
        assert entry["sha256"] == [hashlib.sha256(content).hexdigest()]
        assert entry["seconds"] > 0
    assert len({entry["worker"] for entry in whole.manifest()}) == 2
    assert Image.open(whole.out / "contact-sheet.png").width > 1000


def test_a_picture_opens_as_its_row(whole: Job) -> None:
    entry = whole.manifest()[7]
    image = Image.open(whole.out / entry["files"][0])
    prompt, seed = ROWS[7]
    graph = {node["class_type"]: node["inputs"] for node in json.loads(image.info["prompt"]).values()}
    assert (graph["KoalaPrompt"]["positive"], graph["KoalaSampler"]["seed"]) == (prompt, seed)
    canvas = {node["type"]: node["widgets_values"] for node in json.loads(image.info["workflow"])["nodes"]}
    assert prompt in canvas["KoalaPrompt"]
    assert canvas["KoalaSampler"][0] == seed


def test_the_same_command_again_draws_nothing(whole: Job, table: str, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.pictures()}
    status, said, again = batch(tmp_path, str(WORKFLOW), table, out=whole.out)
    assert status == 0, said
    assert "40 rows, 0 to draw now" in said
    assert {path: path.stat().st_mtime_ns for path in again.pictures()} == before


def test_changed_lost_and_new_rows_are_drawn(whole: Job, tmp_path: Path, one_by_one: OneByOne) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    (out / whole.manifest()[0]["files"][0]).unlink()
    rows = [*ROWS[:-1], ("a white star on a black background", 1)]
    status, said, job = batch(tmp_path, str(WORKFLOW), write_table(tmp_path / "t.csv", rows), "--limit", "1")
    assert status == 0, said
    assert len(job.pictures()) == 40
    status, said, job = batch(tmp_path, str(WORKFLOW), write_table(tmp_path / "t.csv", rows))
    assert status == 0, said
    assert "40 rows, 1 to draw now" in said
    assert len(job.pictures()) == 41


def test_rows_that_were_done_when_their_worker_died_are_not_drawn_again(tmp_path: Path) -> None:
    """A hundred quick rows: several to a block, which Ray begins again as a whole."""
    rows = [(PROMPTS[0], seed) for seed in range(100)]
    graph = json.loads(WORKFLOW.read_text("utf-8"))
    (sampler,) = (node for node in graph["nodes"] if node["type"] == "KoalaSampler")
    sampler["widgets_values"][2:3] = ["custom", 1, 1.0, "leading"]
    workflow = tmp_path / "quick.json"
    workflow.write_text(json.dumps(graph))
    seen: dict[Path, int] = {}
    command = (str(workflow), write_table(tmp_path / "t.csv", rows), "--workers", "1")
    with started(tmp_path, *command) as job:
        wait_for(lambda: len(job.pictures()) >= 20)
        job.workers()[0].send_signal(signal.SIGKILL)
        seen = {path: path.stat().st_mtime_ns for path in job.pictures()}
        status, said = job.end()
        job.leaves_nothing()
    assert status == 0, said
    assert "Rows done: 100 of 100" in said
    assert seen.items() <= {path: path.stat().st_mtime_ns for path in job.pictures()}.items()


def kill_server(job: Job) -> None:
    job.servers()[0].send_signal(signal.SIGKILL)


def kill_worker(job: Job) -> None:
    job.workers()[0].send_signal(signal.SIGKILL)


def kill_keeper(job: Job) -> None:
    job.servers()[0].parent().send_signal(signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_server, kill_worker, kill_keeper])
def test_what_is_killed_is_replaced(
    kill: Callable[[Job], None], table: str, tmp_path: Path, one_by_one: OneByOne
) -> None:
    with started(tmp_path, str(WORKFLOW), table) as job:
        wait_for(lambda: len(job.pictures()) >= 5)
        killed = job.servers()[0]
        kill(job)
        wait_for(lambda: not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE)
        status, said = job.end()
        assert status == 0, said
        job.leaves_nothing()
    has_each_once(job, one_by_one)


def test_a_killed_driver_leaves_nothing_running_and_nothing_undone_twice(
    table: str, tmp_path: Path, one_by_one: OneByOne
) -> None:
    with started(tmp_path, str(WORKFLOW), table) as job:
        wait_for(lambda: len(job.pictures()) >= 5)
        job.process.kill()
        job.leaves_nothing()
    before = {path: path.stat().st_mtime_ns for path in job.pictures()}
    status, said, job = batch(tmp_path, str(WORKFLOW), table)
    assert status == 0, said
    has_each_once(job, one_by_one)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in job.pictures()}.items()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_finishes_what_runs(name: str, table: str, tmp_path: Path, one_by_one: OneByOne) -> None:
    with started(tmp_path, str(WORKFLOW), table) as job:
        wait_for(lambda: len(job.pictures()) >= 5)
        job.process.send_signal(getattr(signal, name))
        status, said = job.end()
        job.leaves_nothing()
    assert status == 130
    assert "Finishing what is being drawn" in said
    done = len(job.manifest())
    assert 5 <= done == len(job.pictures()) < 40
    assert f"Rows done: {done} of 40" in said
    assert f"Rows left: {40 - done}; run the same command again." in said
    status, said, job = batch(tmp_path, str(WORKFLOW), table)
    assert status == 0, said
    has_each_once(job, one_by_one)


def test_a_storage_that_goes_ends_the_job_and_loses_nothing(table: str, tmp_path: Path, one_by_one: OneByOne) -> None:
    with started(tmp_path, str(WORKFLOW), table) as job:
        wait_for(lambda: len(job.pictures()) >= 5)
        job.out.rename(tmp_path / "gone")
        job.out.write_text("no folder")
        status, said = job.end()
        job.leaves_nothing()
    assert status == 1
    assert "cannot be written now" in said
    assert "run the same command again" in said
    job.out.unlink()
    (tmp_path / "gone").rename(job.out)
    status, said, job = batch(tmp_path, str(WORKFLOW), table)
    assert status == 0, said
    has_each_once(job, one_by_one)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a disk")
def test_a_full_disk_ends_the_job_and_loses_nothing(table: str, tmp_path: Path, one_by_one: OneByOne) -> None:
    small = tmp_path / "out"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        status, said, job = batch(tmp_path, str(WORKFLOW), table)
        assert status == 1
        assert "No space left on device" in said
        kept = len(job.pictures())
        assert 0 < kept < 40
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        status, said, job = batch(tmp_path, str(WORKFLOW), table)
        assert status == 0, said
        assert f"40 rows, {40 - kept} to draw now" in said
        has_each_once(job, one_by_one)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@contextlib.contextmanager
def cluster(*nodes: Sequence[str]) -> Iterator[str]:
    """Ray's nodes on this machine, each started with such arguments, and with cores for itself, as machines have; gives
    the address."""
    ray = str(testhost.ensure(testhost.BATCH).with_name("ray"))
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    cores = sorted(os.sched_getaffinity(0))

    def run(*arguments: str, on: Sequence[int] = cores) -> None:
        command = [sys.executable, "-c", ON_CORES, ",".join(map(str, on)), ray, *arguments]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    port, share = str(free_port()), len(cores) // len(nodes)
    head = ("--head", "--port", port, "--include-dashboard", "false")
    further = ("--address", f"127.0.0.1:{port}")
    common = ("--object-store-memory", "200000000", "--disable-usage-stats")
    try:
        for number, arguments in enumerate(nodes):
            own = cores[number * share : (number + 1) * share]
            run("start", *(further if number else head), *common, *arguments, on=own)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "disabled")
            yield further[1]
    finally:
        run("stop", "--force")


@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="two nodes need cores of their own")
def test_two_nodes_of_a_cluster(table: str, tmp_path: Path, one_by_one: OneByOne) -> None:
    """Each with room for one worker."""
    with cluster(("--num-cpus", "1"), ("--num-cpus", "1")) as address:
        status, said, job = batch(tmp_path, str(WORKFLOW), table, "--address", address, "--workers", "2")
    assert status == 0, said
    has_each_once(job, one_by_one)
    assert len({entry["worker"] for entry in job.manifest()}) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="cores of one's own are Linux's")
def test_each_gpu_has_its_workers(comfyui: Path, tmp_path: Path, one_by_one: OneByOne) -> None:
    """Two GPUs in Ray's books, and a ComfyUI that draws on the CPU all the same."""
    some = write_table(tmp_path / "rows.csv", ROWS[:8])
    with cluster(("--num-gpus", "2")) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_PYTHON", sys.executable)
        status, said, job = batch(tmp_path, str(WORKFLOW), some, "--address", address, "--comfyui", str(comfyui))
    assert status == 0, said
    has_each_once(job, {row: one_by_one[row] for row in ROWS[:8]})
    assert len({entry["worker"] for entry in job.manifest()}) == 2


def test_bad_rows_have_their_error_and_the_others_their_picture(comfyui: Path, tmp_path: Path) -> None:
    graph: Prompt = {
        "1": {"class_type": "NotANumber", "inputs": {"seed": 1}, "_meta": {"title": "Make"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
        "3": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 16384, "batch_size": 1, "color": 0}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "y"}},
        "5": {"class_type": "LoadImage", "inputs": {"image": "there.png"}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "z"}},
    }
    Image.new("RGB", (8, 8)).save(comfyui / "input" / "there.png")
    workflow = tmp_path / "graph.json"
    workflow.write_text(json.dumps(graph))
    header = ("Make.seed", "batch_size", "image", "3.width")
    rows = [
        (1, 1, "there.png", 8),
        (13, 1, "there.png", 8),
        (2, 1, "missing.png", 8),
        (3, 4096, "there.png", 16384),
        (4, 1, "there.png", 16),
    ]
    command = (str(workflow), write_table(tmp_path / "t.csv", rows, header), "--comfyui", str(comfyui))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_PYTHON", sys.executable)
        status, said, job = batch(tmp_path, *command)
    assert status == 1
    errors = {entry["row"]: entry["error"] for entry in job.manifest()}
    assert [row for row, error in errors.items() if error] == [2, 3, 4], errors
    assert "NaN" in errors[2]
    assert "missing.png" in errors[3]
    assert "memory" in errors[4].lower()
    assert all(len(entry["files"]) == 3 for entry in job.manifest() if not entry["error"])
    assert "Rows with an error: 3; --retry-errors tries them again" in said
    again = batch(tmp_path, *command, "--retry-errors", "--limit", "1")
    assert "5 rows, 1 to draw now" in again[1]


def test_a_picture_that_no_row_changes_is_every_rows(comfyui: Path, tmp_path: Path) -> None:
    """ComfyUI saves it once and names its file again; beside it, the same prefix gives names anew."""
    graph: Prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "ComfyUI"}},
        "3": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "ComfyUI"}},
    }
    workflow = tmp_path / "graph.json"
    workflow.write_text(json.dumps(graph))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_PYTHON", sys.executable)
        grid = ("--grid", "3.width=24,32,40,48", "--workers", "1", "--comfyui", str(comfyui))
        status, said, job = batch(tmp_path, str(workflow), *grid)
    assert status == 0, said
    for entry in job.manifest():
        sizes = [Image.open(job.out / file).size for file in entry["files"]]
        assert sizes == [(16, 16), (json.loads(entry["inputs"])["3.width"], 8)]


def test_a_row_that_ends_its_server_is_set_aside(comfyui: Path, tmp_path: Path) -> None:
    graph = {
        "1": {"class_type": "EndsTheServer", "inputs": {"seed": 1}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    workflow = tmp_path / "graph.json"
    workflow.write_text(json.dumps(graph))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_PYTHON", sys.executable)
        status, _, job = batch(tmp_path, str(workflow), "--grid", "seed=10..15", "--comfyui", str(comfyui))
    assert status == 1
    errors = {json.loads(entry["inputs"])["seed"]: entry["error"] for entry in job.manifest()}
    assert sorted(errors) == list(range(10, 16))
    assert [seed for seed, error in errors.items() if error] == [13]
    assert "3 times" in errors[13]


def test_a_dry_run_writes_nothing(table: str, tmp_path: Path) -> None:
    status, said, job = batch(tmp_path, str(WORKFLOW), table, "--dry-run")
    assert status == 0, said
    assert not job.out.exists()
    assert "40 rows, 40 to draw now" in said
    assert "prompt ->" in said
    assert said.count("Row ") == 3
    assert io.StringIO(said).read().count('"class_type": "KoalaSampler"') == 3


def test_a_value_that_the_host_would_round_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [("a star", "7.5"), ("a ring", "-1")], HEADER)
    status, said, job = batch(tmp_path, str(WORKFLOW), table)
    assert status == 1
    assert "t.csv, row 1: column seed is 7.5, expected a whole number." in said
    assert "t.csv, row 2: column seed is -1, expected a number from 0 to" in said
    assert not job.pictures()
