"""The other side of lifeline.py, one process for each kept process or folder. Standard library only.

    python keeper.py run COMMAND...      runs the command, and stops it and all that it started
    python keeper.py keep PREFIX FOLDER  makes a temporary folder, names it on stdout, and removes it

It does the latter when its stdin closes: the other end belongs to one process, and closes with it, whatever ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

STOPPED_WITHIN = 10.0  # seconds that a process has to end by itself before it is killed
REMOVED_WITHIN = STOPPED_WITHIN + 10.0  # a folder's process may be on its way out, and still be writing into it
SET_PARENT_DEATH_SIGNAL = 1  # of <sys/prctl.h>
WINDOWS = sys.platform == "win32"
ENDING = ("SIGTERM", "SIGINT", "SIGHUP")


def run(*command: str) -> int:
    """Run a command in a process group of its own; returns its exit status, negative for a signal, as Popen's."""
    over = threading.Event()
    for name in ENDING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: over.set())
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=not WINDOWS,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    except OSError as error:
        print(f"{command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    for wait in (_until_closed, process.wait):
        threading.Thread(target=_then, args=(wait, over.set), daemon=True).start()
    over.wait()
    if process.poll() is None:
        _tell(process, "SIGTERM")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPPED_WITHIN)
    _tell(process, "SIGKILL")  # also what it has started and left behind
    return process.wait()


def _die_with_parent() -> None:
    """In the command's process, before it is the command: when this keeper is killed, Linux kills the command, too."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _then(wait: Callable[[], object], done: Callable[[], None]) -> None:
    wait()
    done()


def _until_closed() -> None:
    """Return when stdin closes."""
    while os.read(0, 4096):  # not sys.stdin: a thread that waits in it would hold a lock that the exit needs
        pass


def _tell(process: subprocess.Popen[bytes], name: str) -> None:
    """Send a signal to a process and all those in its group; on Windows end its tree."""
    if WINDOWS:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS says the latter of one that has ended
        os.killpg(process.pid, getattr(signal, name))


def keep(prefix: str, folder: str) -> int:
    """Make a temporary folder and remove it once stdin closes; returns the exit status.

    It leaves the process that has asked, as some kill all that a killed process had started; stdout closes at the end.
    """
    if not WINDOWS and os.fork():
        return 0
    for name in ENDING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    path = ""
    try:
        path = tempfile.mkdtemp(prefix=prefix, dir=folder)
        print(json.dumps({"folder": path}), flush=True)
        _until_closed()
    except OSError as error:
        if not path:
            print(json.dumps({"error": error.strerror}), flush=True)
    finally:
        if path:
            remove(path)
    return 0


def remove(folder: str) -> None:
    """Delete a folder, again and again while something still writes into it; gives up after a while."""
    until = time.monotonic() + REMOVED_WITHIN
    while os.path.lexists(folder) and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        if os.path.lexists(folder):
            time.sleep(0.1)


def main(task: str, *arguments: str) -> None:
    """End as the command did: with its exit status, or by the same signal."""
    status = run(*arguments) if task == "run" else keep(*arguments)
    sys.stderr.flush()
    if status < 0 and not WINDOWS:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)  # a thread may still wait for stdin


if __name__ == "__main__":
    main(*sys.argv[1:])
