"""Servers, what they start, and temporary folders end with the process that has them, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tools.harness import keeper, lifeline
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
PATIENCE = 120.0  # seconds, for a machine that is busy; what is waited for takes a moment
OWNER = """
import sys
from tools.harness import keeper, lifeline
with lifeline.folder("koala-lifeline-") as folder:
    process = lifeline.start([sys.executable, "-c", sys.argv[1], str(folder)])
    print(folder, flush=True)
    process.wait()
"""
"""Has a folder, and a process that is told of it, until it ends."""
FAMILY = """
import itertools, os, subprocess, sys, time
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
for number in itertools.count():
    with open(os.path.join(sys.argv[1], str(number)), "w") as file:
        file.write(f"{os.getpid()} {below.pid}")
    time.sleep(0.02)
"""
"""A process with one below it, that never stops to write files with both their ids."""

DEFAULT_SIGNALS = """
import os, signal, sys
for name in ("SIGHUP", "SIGINT"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def python(*arguments: str) -> list[str]:
    """A command that runs Python as a shell does in the foreground. `nohup`, and a shell's `&`, have signals ignored,
    and everything below them inherits that: these tests, too."""
    return [sys.executable, "-c", DEFAULT_SIGNALS, *arguments] if os.name == "posix" else [sys.executable, *arguments]


def wait_for(what: Callable[[], object]) -> None:
    """Return once it is so."""
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    """True if it has ended; a container's first process may leave it a zombie for ever."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def owner() -> Iterator[tuple[psutil.Process, Path, list[psutil.Process]]]:
    """A process, the folder that it has, and the two processes that it has."""
    with subprocess.Popen(python("-c", OWNER, FAMILY), cwd=ROOT, stdout=subprocess.PIPE, text=True) as begun:
        folder = Path(begun.stdout.readline().strip())  # type: ignore[union-attr]
        first = folder / "0"
        wait_for(lambda: first.exists() and first.read_text())
        family = [psutil.Process(int(pid)) for pid in first.read_text().split()]
        yield psutil.Process(begun.pid), folder, family
        begun.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
@posix
def test_all_ends_with_the_owner(owner: tuple[psutil.Process, Path, list[psutil.Process]], name: str) -> None:
    process, folder, family = owner
    process.send_signal(getattr(signal, name))
    wait_for(lambda: all(map(gone, [process, *family])))
    wait_for(lambda: not folder.exists())


@posix
def test_a_keeper_that_is_told_to_end_takes_its_process_along(
    owner: tuple[psutil.Process, Path, list[psutil.Process]],
) -> None:
    _, folder, family = owner
    keeper = family[0].parent()
    assert keeper
    keeper.terminate()
    wait_for(lambda: all(map(gone, [keeper, *family])))
    wait_for(lambda: not folder.exists())  # its owner has nothing more to wait for


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_a_killed_keeper_takes_its_process_along() -> None:
    process = lifeline.start(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(1000)"], stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.read(1) == b"1"
    (below,) = psutil.Process(process.pid).children()
    process.kill()
    wait_for(lambda: gone(below))


def test_a_folder_goes_when_all_that_was_started_for_it_is_killed(
    owner: tuple[psutil.Process, Path, list[psutil.Process]],
) -> None:
    """As Ray does with an actor: the process, and every process below it, of whatever group."""
    process, folder, family = owner
    for one in [*process.children(recursive=True), process]:
        one.kill()
    wait_for(lambda: all(map(gone, [process, *family])))
    wait_for(lambda: not folder.exists())


def test_what_listens_to_no_signal_is_ended_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less patience than the ten seconds that a server has."""
    patient = Path(keeper.__file__).read_text("utf-8")
    hasty = tmp_path / "keeper.py"
    hasty.write_text(patient.replace("STOPPED_WITHIN = 10.0", "STOPPED_WITHIN = 1.0"), "utf-8")
    assert hasty.read_text("utf-8") != patient
    monkeypatch.setattr(lifeline, "KEEPER", (*lifeline.KEEPER[:-1], str(hasty)))
    deaf = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\n"
    process = lifeline.start([sys.executable, "-c", deaf + "time.sleep(1000)"], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(1) == b"1"
    below = psutil.Process(process.pid).children()
    lifeline.stop(process)
    assert len(below) == 1
    assert all(map(gone, below))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import sys; print(sys.stdin.read() == '')", 0),
        ("raise SystemExit(3)", 3),
        pytest.param("import os; os.kill(os.getpid(), 9)", -9, marks=posix),
        pytest.param("import os; os.kill(os.getpid(), 15)", -15, marks=posix),
    ],
)
def test_the_exit_status_is_the_commands(code: str, status: int) -> None:
    process = lifeline.start([sys.executable, "-c", code])
    assert process.wait() == status
    lifeline.stop(process)


def test_what_a_process_leaves_behind_goes_when_it_ends() -> None:
    leave = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], "
    leave += "stdout=subprocess.DEVNULL).pid)"
    process = lifeline.start([sys.executable, "-c", leave], stdout=subprocess.PIPE)
    assert process.stdout
    left = int(process.stdout.read())
    assert process.wait() == 0
    wait_for(lambda: not psutil.pid_exists(left) or gone(psutil.Process(left)))


def test_a_program_that_there_is_not_is_named() -> None:
    process = lifeline.start(["/nothing/here"], stderr=subprocess.PIPE)
    said = process.communicate()[1].decode()
    assert said == "/nothing/here cannot be run: No such file or directory\n"
    assert process.returncode == 127


def test_a_folder_goes_at_the_end_of_its_block(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), lifeline.folder("mine-", tmp_path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        assert folder.parent == tmp_path
        assert folder.name.startswith("mine-")
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="file: no temporary folder can be made here"),
        lifeline.folder("mine-", tmp_path / "file"),
    ):
        pass


WORKER = """
import sys, time
from tools.harness import keeper, lifeline
for line in lifeline.lines(sys.stdin):
    print(line.strip(), flush=True)
    time.sleep(float(line))
"""
"""Answers, and then works for so many seconds."""


@pytest.mark.parametrize(("seconds", "status"), [("0", 0), ("1000", 1)])
def test_who_answers_to_lines_ends_with_them_even_at_work(seconds: str, status: int) -> None:
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin
        assert worker.stdout
        for _ in range(1 if float(seconds) else 3):
            worker.stdin.write(f"{seconds}\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == f"{seconds}\n"
        worker.stdin.close()
    assert worker.returncode == status
