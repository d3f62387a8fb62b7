"""`dev.py serve` and `demo` leave nothing behind, whatever ends them: no server, no browser, no temporary folder."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.daily import daily
from tests.dev.test_lifeline import gone, python, wait_for
from tools.harness import browser
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT, Host

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
IN_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Makes what stdin is the terminal of a session, as a shell's is, and runs a command in it."""


@dataclass
class Run:
    """dev.py at work: its process, the folder for all its temporary ones, and what it shows in its terminal."""

    process: psutil.Process
    temporary: Path
    terminal: int
    shown: bytes = b""

    def server(self) -> list[psutil.Process]:
        """ComfyUI, once Python has begun to run it."""
        with contextlib.suppress(psutil.Error):
            return [one for one in self.process.children(recursive=True) if one.cmdline()[1:2] == ["main.py"]]
        return []

    def is_packing(self) -> bool:
        """True while it makes the pack's zip."""
        return any(self.temporary.glob("koala-pack-*/copy/nodes"))

    def shows(self, text: bytes) -> bool:
        """Read what it shows; returns whether the text was among it."""
        if select.select([self.terminal], [], [], 0)[0]:
            self.shown += os.read(self.terminal, 4096)
        return text in self.shown


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Run]:
    """dev.py in another folder, in a terminal of its own."""
    (folder / "temporary").mkdir()
    terminal, inner = os.openpty()
    command = python("-c", IN_A_TERMINAL, sys.executable, str(ROOT / "dev.py"), *arguments)
    environment = {**os.environ, "TMPDIR": str(folder / "temporary"), "COMFYUI_PATH": "", "TERM": "xterm"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, stdin=inner, stdout=inner, stderr=inner
    ) as begun:
        os.close(inner)
        run = Run(psutil.Process(begun.pid), folder / "temporary", terminal)
        try:
            yield run
        finally:
            for process in (*run.server(), run.process):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            with contextlib.suppress(OSError):
                os.close(terminal)


def leaves_nothing(run: Run, server: list[psutil.Process]) -> None:
    wait_for(lambda: all(map(gone, [run.process, *server])))
    wait_for(lambda: not any(run.temporary.iterdir()))


@pytest.mark.parametrize("name", daily(["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"], ("SIGTERM", "SIGINT")))
def test_a_signal_ends_the_server_too(host: Host, tmp_path: Path, name: str) -> None:
    """By day the two that dev.py itself listens to; below, a terminal sends SIGHUP, and SIGKILL ends a demo."""
    with started(tmp_path, "serve") as run:
        wait_for(run.server)
        server = run.server()
        run.process.send_signal(getattr(signal, name))
        leaves_nothing(run, server)


@pytest.mark.nightly
def test_a_closed_terminal_ends_a_server_that_answers(host: Host, tmp_path: Path) -> None:
    with started(tmp_path, "serve") as run:
        wait_for(lambda: run.shows(b"The canvas: http"))
        server = run.server()
        assert len(server) == 1
        os.close(run.terminal)
        leaves_nothing(run, server)


@pytest.mark.nightly
def test_a_demo_that_is_killed_while_it_draws(host: Host, tmp_path: Path) -> None:
    with started(tmp_path, "demo") as run:
        wait_for(lambda: run.shows(b"steps"))
        server = run.server()
        assert len(server) == 1
        run.process.kill()
        leaves_nothing(run, server)


def test_a_demo_that_is_killed_while_it_packs(host: Host, tmp_path: Path) -> None:
    with started(tmp_path, "demo") as run:
        wait_for(run.is_packing)
        run.process.kill()
        leaves_nothing(run, [])


BROWSER = """
import time
from tools.harness import browser
with browser.browser() as started:
    started.new_page()
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("name", daily(["SIGTERM", "SIGKILL"], ("SIGKILL",)))
def test_a_browser_ends_with_its_process(name: str) -> None:
    """Playwright's own doing: its driver stops the browser, and removes the profile, when it is left alone."""
    try:
        browser.chromium()
    except UserError as problem:
        pytest.skip(str(problem))
    with tempfile.TemporaryDirectory(prefix="koala-") as temporary:  # short: it is in the path of a browser's socket
        environment = {**os.environ, "TMPDIR": temporary}
        command = [sys.executable, "-c", BROWSER]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as begun:
            assert begun.stdout
            assert begun.stdout.readline() == "ready\n"
            below = psutil.Process(begun.pid).children(recursive=True)
            assert len(below) > 1
            begun.send_signal(getattr(signal, name))
        wait_for(lambda: all(map(gone, below)))
        wait_for(lambda: not any(Path(temporary).iterdir()))
