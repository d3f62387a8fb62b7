"""What a file is that the safetensors library refuses, told by its first bytes."""

from __future__ import annotations

import json
from pathlib import Path

from .conventions import label

HEADER_LIMIT = 100_000_000  # the safetensors library's own, in bytes


def describe_bad_file(path: Path, wanted: str, error: str) -> str:
    """The error text for a file that is not a good safetensors file: what it is, what was expected, what to do.

    Args:
        path: the file, or a folder in its place.
        wanted: what was expected in the file, such as "KOALA weights".
        error: what the safetensors library said of it.

    Raises OSError where it cannot be read at all.
    """
    if not path.is_file():
        return f"{label(path)} is not a file; expected a .safetensors file of {wanted}. Choose a file."
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        raw = file.read(length if 2 <= length <= HEADER_LIMIT else 56)
    if len(raw) < length <= HEADER_LIMIT and raw.startswith(b'{"'):
        return _cut_short(path, size, f"at least {8 + length:,}")
    end = _end_of_data(raw)
    if end is None:
        return _not_safetensors(path, size, start + raw[:56], wanted)
    if size < 8 + length + end:
        return _cut_short(path, size, f"the {8 + length + end:,}")
    return (
        f"{label(path)} is damaged: its header does not describe its {size:,} bytes ({error}); expected a "
        f".safetensors file of {wanted}. Fetch the file again."
    )


def _end_of_data(raw: bytes) -> int | None:
    """Bytes of tensor data that a header promises; None where the bytes are not such a header."""
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        return None


def _cut_short(path: Path, size: int, promised: str) -> str:
    return (
        f"{label(path)} is cut short: it has {size:,} of {promised} bytes that its header promises. "
        f"The download or copy broke off; fetch the file again."
    )


def _not_safetensors(path: Path, size: int, start: bytes, wanted: str) -> str:
    text = start.lstrip().lower()
    if size == 0:
        what = "is empty"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")) or b"<html" in text:
        what = "is a web page, not weights (a download link that needed a login or led to a page)"
    elif start.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not weights (cloned without git-lfs)"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        what = "is a pickle (.ckpt, .bin, .pt), which may run code when it is read and is not loaded"
    elif start.startswith(b"GGUF"):
        what = "is a GGUF file, which needs a GGUF loader's node"
    else:
        what = f"is not a safetensors file (it begins with {start[:12]!r})"
    return f"{label(path)} {what}; expected a .safetensors file of {wanted}. Fetch the published file again."
