"""A real ComfyUI server in a base folder of its own: demo, serve and the tests all start it here."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.harness import lifeline, pack
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT, Host, requirement_lines

ADDRESS = "127.0.0.1"
LAST_PORT = 65535
READY_WITHIN = 900.0  # seconds; a first start on a busy machine with a cold disk takes minutes
ENDED_WITHIN = 10.0
FOLDERS = ("custom_nodes", "input", "models", "output", "tmp", "user")
# Prints what the server's Python can do: an accelerator, and which of the packages named on its command line it lacks.
PROBE = """
import importlib.metadata, json, sys
def lacks(name):
    try: importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return True
missing = [name for name in sys.argv[1:] if lacks(name)]
gpu = False
if "torch" not in missing:
    import torch
    gpu = torch.cuda.is_available()
print(json.dumps({"missing": missing, "gpu": gpu}))
"""
Probe = Callable[[], tuple[int, str, str]]
"""Waits for a probe: its exit status, what it said, and its errors."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    base: Path  # its --base-directory: models/, input/, output/, user/, custom_nodes/
    log: Path
    process: subprocess.Popen[bytes]  # of tools/harness/lifeline.py

    def last_lines(self, count: int = 30) -> str:
        """The end of its log, without colours."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines()[-count:]
        return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines))


@contextlib.contextmanager
def running(
    host: Host,
    *,
    port: int | None = None,
    model_folders: Mapping[str, Sequence[Path]] | None = None,
    arguments: Sequence[str] = (),
    install: Callable[[Path], object] = pack.install,
) -> Iterator[Server]:
    """Start ComfyUI with the packed pack, wait until it answers, and stop it at the end, whatever happens.

    Everything it writes goes to a temporary base folder; both go when this process is killed, too. ``model_folders``
    adds folders to those in which it looks for models (key as in ``folder_paths``, such as "checkpoints");
    ``arguments`` are added to its command line; ``install`` puts the pack into its custom_nodes. A GPU is used where
    PyTorch finds one. Raises UserError if the port is taken, or if the server stops by itself: the message has the last
    lines of its log.
    """
    check_port(port)
    with lifeline.folder("koala-comfyui-") as base:
        for name in FOLDERS:
            (base / name).mkdir()
        probe = start_probe(host)  # importing torch takes as long as packing
        install(base / "custom_nodes")
        port = port or free_port()
        command = [*base_command(host, base, port), *finish_probe(probe, host), *arguments]
        if folders := model_paths(host, model_folders or {}):
            (base / "extra_model_paths.yaml").write_text(json.dumps(folders), "utf-8")  # JSON is YAML
            command += ["--extra-model-paths-config", str(base / "extra_model_paths.yaml")]
        log = base / "comfyui.log"
        with open(log, "wb") as output:
            process = lifeline.start(
                command, cwd=host.folder, env=environment(host, base), stdout=output, stderr=subprocess.STDOUT
            )
        server = Server(f"http://{ADDRESS}:{port}", base, log, process)
        try:
            wait_until_ready(server)
            yield server
        except ConnectionError as error:
            try:
                process.wait(ENDED_WITHIN)  # its connections close a moment before it is gone
            except subprocess.TimeoutExpired:
                raise error from None
            raise crashed(server, "while it was at work") from error
        finally:
            lifeline.stop(process)


def base_command(host: Host, base: Path, port: int) -> list[str]:
    """The server's command line: nothing of it is written outside ``base``, nothing of it goes to the network."""
    files = ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    network = ["--listen", ADDRESS, "--port", str(port), "--disable-auto-launch", "--disable-api-nodes"]
    return [str(host.python), "main.py", *files, *network]


def environment(host: Host, base: Path | None = None) -> dict[str, str]:
    """The server's environment: this checkout's modules out of its sight, no bytecode into a borrowed folder.

    Temporary files, such as those of PyTorch, go below ``base``.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if host.borrowed:
        variables["PYTHONDONTWRITEBYTECODE"] = "1"
    if base:
        variables |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(base / "tmp"))
    return {**variables, "PYTHONUNBUFFERED": "1"}


def model_paths(host: Host, folders: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, str]]:
    """Contents of extra_model_paths.yaml: the folders asked for, and a borrowed ComfyUI's own model folders."""
    sections: dict[str, dict[str, str]] = {}
    if folders:
        sections["added"] = {key: "\n".join(str(path.resolve()) for path in paths) for key, paths in folders.items()}
    own = host.folder / "models"
    if host.borrowed and own.is_dir():
        sections["borrowed"] = {path.name: str(path) for path in sorted(own.iterdir()) if path.is_dir()}
    return sections


def start_probe(host: Host) -> Probe:
    """Ask the server's Python, in the background, what it can do."""
    return _probe(Host(Path(), host.python, host.borrowed))


@functools.cache  # once a process for each Python: importing torch takes seconds, and tests start several servers
def _probe(host: Host) -> Probe:
    lines = requirement_lines((ROOT / "requirements.txt").read_text("utf-8"))
    names = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in lines]
    command = [str(host.python), "-c", PROBE, "torch", *names]
    process = subprocess.Popen(
        command, env=environment(host), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    @functools.cache
    def answer() -> tuple[int, str, str]:
        output, errors = process.communicate()
        return process.returncode, output, errors

    return answer


def finish_probe(probe: Probe, host: Host) -> list[str]:
    """The probe's answer as arguments for the server. Raises UserError if its Python lacks something."""
    status, output, errors = probe()
    if status:
        raise UserError(f"{host.python} failed when asked about PyTorch:\n{errors.strip()}")
    answer = json.loads(output.splitlines()[-1])
    if "torch" in answer["missing"]:
        raise UserError(
            f"{host.python} has no PyTorch, so it cannot be the Python that runs {host.folder}. "
            "Set COMFYUI_PYTHON to the one that does."
        )
    if answer["missing"]:
        raise UserError(
            f"{host.python} lacks {', '.join(answer['missing'])}, which the pack needs. Install it there: "
            f"{host.python} -m pip install -r {ROOT / 'requirements.txt'}"
        )
    return [] if answer["gpu"] else ["--cpu"]


def wait_until_ready(server: Server) -> None:
    """Return as soon as the server answers. Raises UserError if it ends or takes too long."""
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise crashed(server, "while starting")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.url}/system_stats", timeout=5).close()
            return
        time.sleep(0.1)
    raise UserError(
        f"ComfyUI did not answer within {READY_WITHIN:.0f} s. The last lines of its log:\n{server.last_lines()}"
    )


def crashed(server: Server, when: str) -> UserError:
    """The error for a server that ended by itself."""
    status = server.process.returncode
    return UserError(f"ComfyUI ended {when} (exit status {status}). The last lines of its log:\n{server.last_lines()}")


def check_port(port: int | None) -> None:
    """Raise UserError if there is no such port, or something else listens on it already."""
    if port is None:
        return
    if not 0 < port <= LAST_PORT:
        raise UserError(f"Port {port}: expected 1 to {LAST_PORT}, or none to take a free one.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection lately closed does not count
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise UserError(
                f"Port {port} cannot be used ({error.strerror}). Give another --port, or none to take a free one."
            ) from error


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port: int = probe.getsockname()[1]
    return port
