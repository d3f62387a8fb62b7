"""Files and folders onto the disk, whole or not at all: written beside their place, then given their name."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .unfinished import unfinished

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHOWN = 60
"""Characters of a name that is too long."""
SYSTEM_ERRORS = (
    re.compile(r"I/O error: (?P<text>.*) \(os error (?P<code>\d+)\)"),
    re.compile(r'code: (?P<code>\d+), .*message: "(?P<text>.*)"'),
)
"""How the safetensors library words an error of the operating system: from version 0.6 on, and before."""


class SaveError(OSError):
    """Something could not be written; the first line names it, what happened and what to do. Nothing is left behind."""

    __module__ = "koala"  # the host prefixes an error's text with this; a pack's true module name is a path


@contextmanager
def written_whole(target: Path, size: int = 0, replace: bool = False) -> Iterator[Path]:
    """Yield a path beside ``target`` to write a file or folder to; it then gets its name.

    Whatever is raised inside, what was written is deleted; what a process left that was killed is deleted by the next.

    Args:
        target: the file or folder.
        size: about how many bytes will be written.
        replace: whether to replace a file or folder that has the name already; otherwise it stays as it is.

    Raises SaveError in place of any OSError, such as a full disk, and before anything is written where the disk has too
    little room, or the name is taken or too long.
    """
    try:
        _require_name(target, replace)
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{_gigabytes(free)} are free")
        with unfinished(target.parent) as aside:
            yield aside
            if replace:
                _replace(aside, target)
            else:
                _rename(aside, target)
    except OSError as error:
        raise SaveError(_reason(target, size, error)) from error


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new safetensors file. Raises OSError where it cannot be written, or is there already."""
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, dict(metadata))
    except SafetensorError as error:
        raise _system_error(str(error)) from error
    if path.stat().st_mode != mode:  # from 0.8 on the library puts a file of its own, its owner's alone, in the place
        path.chmod(mode)
    _flush(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small new file. Raises OSError where it cannot be written, or is there already."""
    with path.open("xb") as file:
        file.write(content)
    _flush(path)


def replace_file(target: Path, content: str | bytes) -> None:
    """Write a small file, text as UTF-8, in place of the one that has its name. Raises SaveError."""
    data = content.encode() if isinstance(content, str) else content
    with written_whole(target, len(data), replace=True) as aside:
        write_bytes(aside, data)


def _flush(path: Path) -> None:
    """To the disk itself, so that no power cut leaves a name over missing data."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _system_error(said: str) -> OSError:
    """The operating system's error in the safetensors library's words."""
    for found in filter(None, (pattern.search(said) for pattern in SYSTEM_ERRORS)):
        code = int(found["code"])
        return OSError(code, found["text"], None, code)  # the last is Windows' number; other systems ignore it
    return OSError(said)


def _require_name(target: Path, replace: bool) -> None:
    """Raises OSError where a name is too long for the file system, or taken and not to be replaced."""
    with suppress(FileNotFoundError):
        target.lstat()
        if not replace:
            raise FileExistsError(errno.EEXIST, "the name is taken", str(target))


def _rename(aside: Path, target: Path) -> None:
    """Give a finished file or folder its name; raises FileExistsError where something has it."""
    if aside.is_file():
        try:
            os.link(aside, target)  # fails where the name is taken; a rename would overwrite
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
        else:
            aside.unlink()
            return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "the name is taken", str(target))
    aside.rename(target)


def _replace(aside: Path, target: Path) -> None:
    """Give a finished file or folder the name of an older one; a folder is absent for a moment."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(aside, target)


def _reason(target: Path, size: int, error: OSError) -> str:
    if error.errno in FULL:
        return (
            f"no space left for {target.name}: {_gigabytes(size)} needed in {target.parent} ({error.strerror}). "
            f"Free space there and run again; nothing was left behind."
        )
    if isinstance(error, FileExistsError):
        return f"{target.name} is in {target.parent} already and was left as it is. Run again, or choose another name."
    if error.errno == errno.ENAMETOOLONG:
        return (
            f"{target.name[:SHOWN]}... is too long a name for {target.parent}: it has {len(os.fsencode(target.name))} "
            f"bytes with its number and ending. Choose a shorter one and run again; nothing was written."
        )
    return (
        f"{target.name} could not be written in {target.parent}: {error.strerror or error}. "
        f"Make the folder writable, or choose another one, and run again; nothing was left behind."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
