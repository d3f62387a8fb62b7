"""The server as demo, serve and tests start it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tools.harness.client import Client
from tools.harness.errors import UserError
from tools.harness.server import Server, free_port, running
from tools.harness.testhost import Host


def listing(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_it_is_the_pinned_comfyui_with_our_pack_in_it(client: Client, server: Server) -> None:
    assert client.get("/system_stats")["system"]["comfyui_version"] == "0.30.0"
    assert [path.name for path in (server.base / "custom_nodes").iterdir()] == ["koala-sdxl"]
    assert "IMPORT FAILED" not in server.log.read_text()


def test_a_crash_shows_the_end_of_the_log(host: Host) -> None:
    with (
        pytest.raises(
            UserError, match=r"(?s)ended while starting \(exit status 2\).*unrecognized arguments: --no-such"
        ),
        running(host, arguments=["--no-such"]),
    ):
        pass


def test_a_taken_port_is_named(host: Host) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} cannot be used"), running(host, port=port):
            pass


@pytest.mark.slow
def test_extra_model_folders_a_given_port_and_a_death_at_work_that_is_reported(host: Host, tmp_path: Path) -> None:
    (tmp_path / "some.safetensors").touch()
    port = free_port()
    before = listing(host.folder)

    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }

    def look_and_kill(server: Server) -> None:
        assert server.url.endswith(f":{port}")
        assert "some.safetensors" in Client(server.url).get("/models/checkpoints")
        process = psutil.Process(server.process.pid).children()[0]
        Client(server.url).run(graph, on_event=lambda *_: process.kill())

    with (
        pytest.raises(UserError, match=r"(?s)ended while it was at work \(exit status -9\).*To see the GUI go to"),
        running(host, port=port, model_folders={"checkpoints": [tmp_path]}) as server,
    ):
        look_and_kill(server)
    assert not server.base.exists()
    assert listing(host.folder) == before


@pytest.mark.slow
def test_a_borrowed_comfyui_is_left_as_it_is_and_the_server_ends_with_an_exception(host: Host, tmp_path: Path) -> None:
    own = tmp_path / "ComfyUI"
    own.mkdir()
    for entry in host.folder.iterdir():
        if entry.name not in ("models", "custom_nodes", "__pycache__"):
            (own / entry.name).symlink_to(entry)
    (own / "models" / "checkpoints").mkdir(parents=True)
    (own / "models" / "checkpoints" / "mine.safetensors").touch()
    (own / "custom_nodes" / "other-pack").mkdir(parents=True)
    before = subprocess.run(["ls", "-lRL", str(own)], capture_output=True, check=True).stdout
    with (
        contextlib.suppress(ZeroDivisionError),
        running(Host(own, host.python, borrowed=True)) as server,
    ):
        client = Client(server.url)
        assert "mine.safetensors" in client.get("/models/checkpoints")
        assert "KoalaSampler" in client.object_info()
        assert "other-pack" not in server.log.read_text()
        raise ZeroDivisionError
    assert server.process.poll() is not None
    assert not server.base.exists()
    assert subprocess.run(["ls", "-lRL", str(own)], capture_output=True, check=True).stdout == before


def test_a_python_without_pytorch_is_named(host: Host, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(host.python), "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    with (
        pytest.raises(UserError, match=r"has no PyTorch.*COMFYUI_PYTHON"),
        running(Host(host.folder, python, borrowed=True)),
    ):
        pass
