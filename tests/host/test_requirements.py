"""ComfyUI without diffusers, and a ComfyUI that is too old: what the log says, and what works meanwhile."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.host.test_nodes import graph, picture, seen
from tests.host.test_speed_node import accelerated
from tools.harness import lifeline, pack
from tools.harness.client import Client, GraphError, Prompt
from tools.harness.server import Server, base_command, environment, free_port, running, wait_until_ready
from tools.harness.testhost import TOO_OLD, Host, pinned_host, python_of

FOLDERS = ("custom_nodes", "input", "models", "output", "tmp", "user")
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"


def packages(python: Path) -> Path:
    """The folder with a Python's packages."""
    return Path(subprocess.run([python, "-c", SITE], capture_output=True, text=True, check=True).stdout.strip())


@pytest.fixture(scope="module")
def without_diffusers(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose Python has every package of the test host's but diffusers."""
    venv = tmp_path_factory.mktemp("python")
    subprocess.run([host.python, "-m", "venv", "--without-pip", venv], check=True)
    python = python_of(venv)
    known, own = packages(host.python), packages(python)
    for package in known.iterdir():
        if not package.name.startswith("diffusers") and not (own / package.name).exists():
            (own / package.name).symlink_to(package)
    bare = Host(host.folder, python, borrowed=True)
    with lifeline.folder("koala-comfyui-") as base:
        for name in FOLDERS:
            (base / name).mkdir()
        pack.install(base / "custom_nodes")
        port, log = free_port(), base / "comfyui.log"
        command = [*base_command(bare, base, port), "--cpu"]
        with open(log, "wb") as output:
            process = lifeline.start(
                command, cwd=bare.folder, env=environment(bare, base), stdout=output, stderr=subprocess.STDOUT
            )
        server = Server(f"http://127.0.0.1:{port}", base, log, process)
        try:
            wait_until_ready(server)
            yield server
        finally:
            lifeline.stop(process)


@pytest.mark.nightly
@pytest.mark.slow
def test_without_diffusers_the_log_says_what_to_run(without_diffusers: Server) -> None:
    log = without_diffusers.log.read_text("utf-8")
    (line,) = [line for line in log.splitlines() if "diffusers is not" in line]
    assert (
        "KOALA Sampler, KOALA Scheduler and KOALA Accelerate will not run: diffusers is not installed; expected "
        in line
    )
    assert re.search(r"/bin/python -m pip install -r /\S+/custom_nodes/koala-sdxl/requirements\.txt, and restart", line)
    assert "IMPORT FAILED" not in log


def with_scheduler() -> Prompt:
    scheduler = {"model": ["1", 0], "steps": 25, "spacing": "auto", "denoise": 1.0}
    return {
        "1": graph()["1"],
        "2": {"class_type": "KoalaScheduler", "inputs": scheduler},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }


def with_accelerate() -> Prompt:
    return by_ksampler(accelerated({"preset": "balanced"}))


def by_ksampler(prompt: Prompt) -> Prompt:
    """The graph with KSampler in KOALA Sampler's place."""
    settings = {"steps": 25, "cfg": 7.5, "sampler_name": "euler", "scheduler": "ddim_uniform", "denoise": 1.0}
    wires = {key: prompt["4"]["inputs"][key] for key in ("model", "positive", "negative", "latent_image", "seed")}
    return {**prompt, "4": {"class_type": "KSampler", "inputs": {**wires, **settings}}}


@pytest.mark.slow
@pytest.mark.parametrize("made", [graph, with_scheduler, with_accelerate])
def test_without_diffusers_the_nodes_that_need_it_say_so(made: Callable[[], Prompt], without_diffusers: Server) -> None:
    with pytest.raises(GraphError, match=r"diffusers is not installed; expected diffusers 0\.30\.0 or newer.*-m pip"):
        Client(without_diffusers.url).run(made())


@pytest.mark.slow
def test_without_diffusers_the_other_nodes_work(without_diffusers: Server) -> None:
    prompt = by_ksampler(graph())
    assert seen(picture(Client(without_diffusers.url), prompt)) == ("red", "circle", "blue")


@pytest.mark.slow
@pytest.mark.nightly
def test_a_comfyui_that_is_too_old_is_named_in_its_log() -> None:
    with running(pinned_host(TOO_OLD)) as server:
        client = Client(server.url)
        assert client.get("/system_stats")["system"]["comfyui_version"] == TOO_OLD
        assert not [name for name in client.object_info() if name.startswith("Koala")]
        log = server.log.read_text("utf-8", "replace")
    (line,) = [line for line in log.splitlines() if "Cannot import" in line and "koala-sdxl" in line]
    assert f"koala-sdxl module for custom nodes: this ComfyUI is {TOO_OLD}; KOALA for ComfyUI needs 0.18.2" in line
    assert line.endswith("or newer. Update ComfyUI, install its requirements.txt again, and restart it.")
