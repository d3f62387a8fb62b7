"""Processes and temporary folders that go with the process that has them, whatever ends it, SIGKILL included.

Each hangs on a pipe, and only this process has the end that is written to. When that closes, at the end of a ``with``
block or because this process is gone, keeper.py at the other end stops the process and all that it started, or removes
the folder. There is no other way in which they end, so every run tries it; it is the same on every system.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tools.harness import keeper
from tools.harness.errors import UserError

KEEPER = (sys.executable, "-I", "-S", keeper.__file__)  # without packages it is there in 20 ms


FINISHED_WITHIN = 5.0  # seconds for what is to be done after the last answer


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command that ends by ``stop``, or when this process does.

    ``options`` are Popen's, but for stdin, which is empty. Of what is returned, exit status, ``poll`` and ``wait`` are
    the command's; the pid is its keeper's, whose only child it is.
    """
    return subprocess.Popen([*KEEPER, "run", *command], stdin=subprocess.PIPE, start_new_session=True, **options)


def stop(process: subprocess.Popen[Any]) -> None:
    """End what ``start`` began, by force if it does not listen for ten seconds; return when it is gone."""
    if process.stdin:
        process.stdin.close()
    process.wait()


@contextlib.contextmanager
def folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder, in the system's place for them or in ``parent``. Raises UserError if none can be made."""
    place = str(parent or tempfile.gettempdir())
    with subprocess.Popen(
        [*KEEPER, "keep", prefix, place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            answer = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            if os.name == "posix":
                process.wait()  # it has left a child that is nobody's; a zombie would be in the way of who looks here
            if "error" in answer:
                raise UserError(f"{place}: no temporary folder can be made here ({answer['error']}).")
            yield Path(answer["folder"])
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.stdout.read()  # type: ignore[union-attr]  # it closes when the folder is gone
            process.wait()


def lines(stream: TextIO) -> Iterator[str]:
    """The lines of a stream as they come, for a process whose stdin it is and that answers to each.

    When it closes while a line is being worked on, who has asked is gone: this process ends, with exit status 1.
    """
    came: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    idle = threading.Event()

    def read() -> None:
        for line in stream:
            came.put(line)
        came.put(None)
        if not idle.wait(FINISHED_WITHIN):
            os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        idle.set()
        line = came.get()
        if line is None:
            return
        idle.clear()
        yield line
