"""`dev.py batch` as it is run, with real Ray and real servers, and what it is compared with: one server, row by row."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from PIL import Image
from pyarrow import parquet

from tools.harness.client import Client, Prompt
from tools.harness.server import running
from tools.harness.testhost import ROOT, Host
from tools.harness.workflow import to_prompt

WORKFLOW = ROOT / "example_workflows" / "01 KOALA-tiny text to image.json"
PROMPTS = (
    "a red circle on a white background",
    "a blue star on a yellow background",
    "a gray koala on a green background",
    "a purple ring on a white background",
    "a green square on a red background",
)
ROWS = tuple((prompt, seed) for seed in range(8) for prompt in PROMPTS)
"""Forty: prompt and seed."""
HEADER = ("prompt", "seed")
PATIENCE = 600.0  # seconds: two servers start on two cores
MARK = "KOALA_BATCH_TEST"
"""An environment variable by which all processes of a job are known."""


@dataclass(frozen=True)
class Job:
    """A job at work, all its files below a folder of its own."""

    process: subprocess.Popen[str]
    out: Path
    mark: str
    temporary: Path

    def pictures(self) -> list[Path]:
        """That are done."""
        return sorted(path for path in (self.out / "pictures").glob("*/*") if not path.name.startswith("."))

    def manifest(self) -> list[dict]:
        """Its rows."""
        return parquet.read_table(self.out / "manifest.parquet").to_pylist()

    def processes(self) -> list[psutil.Process]:
        """All that were started for it and are there."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def servers(self) -> list[psutil.Process]:
        """Its ComfyUIs."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[1:2] == ["main.py"]:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Ray's processes that draw: what has started the keepers of its ComfyUIs."""
        found = []
        for server in self.servers():
            with contextlib.suppress(psutil.Error):
                found.append(server.parent().parent())
        return found

    def end(self) -> tuple[int, str]:
        """Wait for its end; its exit status and all that it has said."""
        said, _ = self.process.communicate(timeout=900)
        return self.process.returncode, said

    def leaves_nothing(self) -> None:
        """No process, no temporary folder."""
        wait_for(lambda: not self.processes())
        wait_for(lambda: not any(self.temporary.iterdir()))


@contextlib.contextmanager
def started(folder: Path, *arguments: str, out: Path | None = None) -> Iterator[Job]:
    """`dev.py batch` with two workers, unless the arguments say otherwise."""
    mark = f"{folder}-{os.urandom(4).hex()}"
    temporary = folder / f"temporary-{mark[-8:]}"
    temporary.mkdir()
    out = out or folder / "out"
    end = [] if {"--address", "--workers"} & {*arguments} else ["--workers", "2"]
    command = [sys.executable, str(ROOT / "dev.py"), "batch", *arguments, "--out", str(out), *end]
    environment = {**os.environ, MARK: mark, "TMPDIR": str(temporary), "COMFYUI_PATH": ""}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        job = Job(process, out, mark, temporary)
        try:
            yield job
        finally:
            for one in job.processes():
                with contextlib.suppress(psutil.Error):
                    one.send_signal(signal.SIGKILL)


def wait_for(what: Callable[[], object]) -> None:
    """Return once it is so."""
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def batch(folder: Path, *arguments: str, out: Path | None = None) -> tuple[int, str, Job]:
    """Run `dev.py batch` to its end: exit status, what it has said, and what it has left."""
    with started(folder, *arguments, out=out) as job:
        status, said = job.end()
        job.leaves_nothing()
    return status, said, job


def write_table(path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = HEADER) -> str:
    """A CSV file; returns its path as text."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="session")
def one_by_one(host: Host) -> dict[tuple[str, int], bytes]:
    """What one server draws for each of ROWS, as pixels: with one thread, as each of two workers on two cores has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
        with running(host) as server:
            client = Client(server.url)
            graph = to_prompt(json.loads(WORKFLOW.read_text("utf-8")), client.object_info())
            return {row: pixels(_drawn(client, graph, *row)) for row in ROWS}


def _drawn(client: Client, graph: Prompt, prompt: str, seed: int) -> bytes:
    for node in graph.values():
        if node["class_type"] == "KoalaPrompt":
            node["inputs"]["positive"] = prompt
        if node["class_type"] == "KoalaSampler":
            node["inputs"]["seed"] = seed
    return client.view(client.run(graph).images()[0])


def pixels(png: bytes) -> bytes:
    """Of an image's file."""
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def has_each_once(job: Job, wanted: dict[tuple[str, int], bytes]) -> None:
    """Every row has one picture, bit for bit the one wanted, and one entry in the manifest."""
    entries = job.manifest()
    assert [entry["row"] for entry in entries] == list(range(1, len(wanted) + 1))
    assert len(job.pictures()) == len(wanted)
    for entry, row in zip(entries, ROWS, strict=False):
        assert json.loads(entry["inputs"]) == {"prompt": row[0], "seed": str(row[1])}
        assert entry["error"] is None
        assert pixels((job.out / entry["files"][0]).read_bytes()) == wanted[row]


@pytest.fixture(scope="session")
def comfyui(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's own ComfyUI, with a pack of theirs; it draws on the CPU, also for a worker that has a GPU."""
    folder = tmp_path_factory.mktemp("own") / "ComfyUI"
    folder.mkdir()
    for part in host.folder.iterdir():
        if part.name not in ("custom_nodes", "input", "output", "user", "temp", "main.py"):
            (folder / part.name).symlink_to(part)
    main = (host.folder / "main.py").read_bytes()
    (folder / "main.py").write_bytes(b"import sys; sys.argv.append('--cpu')\n" + main)
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "bad-rows").symlink_to(Path(__file__).parent / "pack")
    (folder / "input").mkdir()
    return folder
