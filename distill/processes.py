"""The processes of a run: one run per folder, all processes on the same storage, and one error for all of them.

Where one process raised alone, the others would wait for it until the process group's timeout.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from .errors import UserError

Result = TypeVar("Result")
LOCK = ".lock"
"""The file in a folder that a run holds; its content is the run's own."""
PATIENCE = 5.0
"""Seconds until a network file system shows other machines a new file."""
RELEASE = 10.0
"""Seconds until the workers of a killed run, which hold its lock, have noticed and ended."""


def require_connected(accelerator: Accelerator) -> None:
    """Raises UserError where a launcher started several processes that do not know of each other."""
    wanted = int(os.environ.get("WORLD_SIZE") or 1)
    if wanted > accelerator.num_processes:
        raise UserError(
            f"the launcher started {wanted} processes, but this machine has no GPU that they could use, and each would "
            f"train alone; expected a GPU for each. Start the trainer without a launcher, or set "
            f"ACCELERATE_USE_CPU=true to train with {wanted} processes on the CPU."
        )


def on_every(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What ``work`` returns on this process. Raises the first process's UserError on all of them."""
    found, fault = list[Result](), None
    try:
        found.append(work())
    except UserError as error:
        fault = str(error)
    if faults := [one for one in gather_object([fault]) if one]:
        raise UserError(faults[0])
    return found[0]


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What ``work`` returns on the main process, or the UserError that it raises there, on every process."""
    found: list[Any] = on_every(accelerator, lambda: [work() if accelerator.is_main_process else None])
    result: Result = broadcast_object_list(found)[0]
    return result


def require_same(accelerator: Accelerator, seen: str, what: str, advice: str) -> None:
    """Raises UserError, on every process, where they do not all see the same."""
    answers = gather_object([(socket.gethostname(), seen)])
    main = answers[0]
    for number, (machine, other) in enumerate(answers):
        if other != main[1]:
            raise UserError(
                f"{what} is another one for process {number} (on {machine}: {other}) than for process 0 (on {main[0]}: "
                f"{main[1]}); expected the same for all. {advice}"
            )


@contextmanager
def held(accelerator: Accelerator, folder: Path, key: str) -> Iterator[None]:
    """Hold a folder for this run, and check that every process sees the same folder; called on every process.

    ``key`` is the configuration's, for messages. Raises UserError where another run holds the folder, it cannot be
    made, or a process sees another folder.
    """
    with ExitStack() as stack:
        lock = on_main(accelerator, lambda: stack.enter_context(_locked(folder, key)))
        sees = "this folder" if _appears(folder / LOCK, lock) else "a folder of its own"
        advice = f"Set {key} to a folder on storage that all machines share, and start again."
        require_same(accelerator, sees, f"{key} = {str(folder)!r}", advice)
        yield


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[str]:
    """Hold a folder's lock; yields its content."""
    content = uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _taken(folder, key)
        file.truncate(0)
        file.write(content.encode())
        file.flush()
    except OSError as error:
        raise UserError(f"{key} = {str(folder)!r} cannot be written to ({error.strerror}). Change it.") from None
    try:
        yield content
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        file.close()


def _taken(folder: Path, key: str) -> IO[bytes]:
    deadline = time.monotonic() + RELEASE
    while True:
        file = (folder / LOCK).open("a+b")
        if _take(file) and _is_in_place(file, folder / LOCK):
            return file
        file.close()  # another run holds it, or has just deleted it
        if time.monotonic() > deadline:
            raise UserError(
                f"{key} = {str(folder)!r} is in use by another run; expected a folder that no other run uses. Wait "
                f"until that run has ended, or choose another folder."
            )
        time.sleep(0.1)


def _is_in_place(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _appears(path: Path, content: str) -> bool:
    """Whether a file has this content, or gets it in time."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError):
            if path.read_text() == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


if sys.platform == "win32":
    import msvcrt

    def _take(file: IO[bytes]) -> bool:
        file.seek(1 << 20)  # beyond the content, which others read
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _take(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks
        return True
