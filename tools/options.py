"""Kinds of arguments of dev.py's commands: what each takes, checked before anything starts, an error in one line.

Standard library only. Each function here is given to argparse as a ``type``: it turns the text into a value, or raises
ArgumentTypeError with what was found and what was expected.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from os.path import isdir, isfile
from pathlib import Path
from typing import NoReturn

from tools.harness import server, testhost
from tools.harness.errors import UserError

STATUS = 2
"""Exit status for a command line that is wrong."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        self.exit(STATUS, f"{self.prog}: {message}. See {self.prog} --help.\n")


def wrong(found: object, expected: str) -> argparse.ArgumentTypeError:
    """The error for one argument."""
    return argparse.ArgumentTypeError(f"{found}: expected {expected}")


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number, ``least`` to ``most``."""
    expected = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            found = int(text)
            if found >= least and (most is None or found <= most):
                return found
        raise wrong(text, expected)

    return read


def one_of(*words: str) -> Callable[[str], str]:
    """One of some words."""

    def read(text: str) -> str:
        if text not in words:
            raise wrong(text, f"one of {', '.join(words)}")
        return text

    return read


def port(text: str) -> int:
    """A port of this machine that nothing listens on."""
    found = number(1, server.LAST_PORT)(text)
    try:
        server.check_port(found)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    return found


def comfyui(text: str) -> Path:
    """The folder of a ComfyUI; it may come from COMFYUI_PATH."""
    try:
        return testhost.own_host(Path(text), None).folder
    except UserError as error:
        source = " (from COMFYUI_PATH)" if text == os.environ.get("COMFYUI_PATH") else ""
        raise argparse.ArgumentTypeError(str(error).rstrip(".") + source) from None


def existing(expected: str, kind: Callable[[Path], bool] = os.path.exists) -> Callable[[str], Path]:
    """A file or folder that is there and of a kind; ``expected`` says in words what it should be."""

    def read(text: str) -> Path:
        if not kind(_named(text, expected)):
            found = "this is a folder" if isdir(text) else "this is a file" if isfile(text) else "there is nothing here"
            raise wrong(text, f"{expected}; {found}")
        return Path(text)

    return read


def file_to_write(text: str) -> Path:
    """A file that can be written: it is no folder, and new ones can be made where it lies."""
    path = _named(text, "a file to write")
    if isdir(path):
        raise wrong(text, "a file to write; this is a folder")
    _require_room(path.parent, path)
    return path


def folder_to_write(text: str) -> Path:
    """A folder that can be written to, or made."""
    path = _named(text, "a folder")
    if isfile(path):
        raise wrong(text, "a folder; this is a file")
    _require_room(path, path)
    return path


def image_to_write(text: str) -> Path:
    """A PNG that there is not yet, or a folder."""
    path = _named(text, "a PNG to write, or a folder")
    is_image = path.suffix.lower() == ".png"
    if isfile(path):
        new = "a new file; this one exists already, and was not changed"
        raise wrong(text, new if is_image else "a folder, or a name that ends in .png; this is another file")
    return file_to_write(text) if is_image else folder_to_write(text)


def _named(text: str, expected: str) -> Path:
    if not text:
        raise wrong("an empty name", expected)
    return Path(text)


def _require_room(folder: Path, path: Path) -> None:
    """Raise ArgumentTypeError unless files can be made in a folder, or in the nearest one above it that there is."""
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # what no file can be named is said here
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise wrong(path, f"a place that can be written to ({error.strerror})") from None
