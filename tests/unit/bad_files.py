"""A catalogue of files that are not KOALA models: ``BAD[name].make(path)`` writes one, ``says`` and ``do`` are what the
error about it must contain: what the file is, and what loads it or what to do.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from koala_sdxl.koala.architecture.layout import KOALA_700M
from tests.unit import files
from tests.unit.others import OTHER_MODELS, PUBLISHED
from tests.unit.reference import Shapes


@dataclass(frozen=True)
class BadFile:
    """How to write the file, what the error must call it, and what it must advise."""

    make: Callable[[Path], object]
    says: str
    do: str


# --- a KOALA that is not whole, or of no use ------------------------------------------------------------------------


def _without(count: int) -> Shapes:
    found = files.unet(KOALA_700M)
    return {key: found[key] for key in list(found)[: len(found) - count]}


TEXT_WEIGHT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"

BROKEN: dict[str, tuple[Callable[[], Shapes], str, str, str]] = {
    "missing-two": (
        lambda: _without(2),
        "F16",
        "2 missing (first: conv_out.weight, conv_out.bias)",
        PUBLISHED + "700m",
    ),
    "missing-many": (lambda: _without(400), "F16", "400 missing (first: ", PUBLISHED + "700m"),
    "extra": (
        lambda: {**files.unet(KOALA_700M), "step": (1,), "spare.weight": (2, 2)},
        "F16",
        "2 extra (first: step, spare.weight)",
        PUBLISHED + "700m",
    ),
    "misshapen": (
        lambda: {**files.unet(KOALA_700M), "conv_out.weight": (4, 320, 1, 1)},
        "F16",
        "1 misshapen (first: conv_out.weight [4, 320, 1, 1] instead of [4, 320, 3, 3])",
        PUBLISHED + "700m",
    ),
    "flat-input": (
        lambda: {**files.unet(KOALA_700M), "conv_in.weight": (320,)},
        "F16",
        "1 misshapen (first: conv_in.weight [320] instead of [320, 4, 3, 3])",
        PUBLISHED + "700m",
    ),
    "flat-text-weight": (
        lambda: {**files.unet(KOALA_700M), TEXT_WEIGHT: (640,)},
        "F16",
        f"1 misshapen (first: {TEXT_WEIGHT} [640] instead of [640, 2048])",
        PUBLISHED + "700m",
    ),
    "five-input-channels": (
        lambda: {**files.unet(KOALA_700M), "conv_in.weight": (320, 5, 3, 3)},
        "F16",
        "1 misshapen (first: conv_in.weight [320, 5, 3, 3] instead of [320, 4, 3, 3])",
        PUBLISHED + "700m",
    ),
    "int8": (
        lambda: files.unet(KOALA_700M),
        "I8",
        "KOALA-700M's U-Net quantised or in an unusual type (I8)",
        PUBLISHED,
    ),
    "double": (
        lambda: files.unet(KOALA_700M),
        "F64",
        "KOALA-700M's U-Net quantised or in an unusual type (F64)",
        PUBLISHED,
    ),
    "scaled-fp8": (
        lambda: {**files.unet(KOALA_700M), "scaled_fp8": (2,), "down_blocks.0.resnets.0.conv1.scale_weight": (1,)},
        "F8_E4M3",
        "KOALA-700M's U-Net quantised",
        PUBLISHED,
    ),
}
"""KOALA U-Nets with a fault: tensors, type, what the error says, what it advises."""


# --- no safetensors file, or not all of one -------------------------------------------------------------------------


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _cut(path: Path) -> None:
    files.write(path, files.unet(KOALA_700M))
    os.truncate(path, 1_000_000)


def _longer(path: Path) -> None:
    files.write(path, {"conv_in.weight": (320, 4, 3, 3)})
    os.truncate(path, path.stat().st_size + 1)


def _zip_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))


def _bad_offsets(path: Path) -> None:
    start = files.header({"conv_in.weight": (320, 4, 3, 3)}).replace(b"[320,4,3,3]", b"[320,4,3,1]")
    path.write_bytes(start)
    os.truncate(path, len(start) + 320 * 4 * 3 * 3 * 2)


HEADER = files.header(files.unet(KOALA_700M))
FETCH = "fetch the"

UNREADABLE: dict[str, BadFile] = {
    "empty": BadFile(_write(b""), "is empty", FETCH),
    "five-bytes": BadFile(_write(b"hello"), "is not a safetensors file (it begins with b'hello')", FETCH),
    "cut": BadFile(_cut, f"has 1,000,000 of the {len(HEADER) + 2 * 782_822_724:,} bytes", FETCH),
    "cut-in-header": BadFile(_write(HEADER[:5000]), f"has 5,000 of at least {len(HEADER):,} bytes", FETCH),
    "one-byte-longer": BadFile(_longer, "is damaged", FETCH),
    "offsets-against-shapes": BadFile(_bad_offsets, "is damaged", FETCH),
    "web-page": BadFile(_write(b"<!DOCTYPE html>\n<html><head><title>Sign in</title>"), "is a web page", FETCH),
    "web-page-indented": BadFile(_write(b"\n  <html lang='en'>" + b" " * 200), "is a web page", FETCH),
    "git-lfs-pointer": BadFile(
        _write(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1565712080\n"),
        "is a Git LFS pointer",
        FETCH,
    ),
    "pickle-zip": BadFile(_zip_pickle, "is a pickle", FETCH),
    "pickle-legacy": BadFile(_write(pickle.dumps({"state_dict": list(range(999))}, protocol=2)), "is a pickle", FETCH),
    "pickle-4": BadFile(_write(pickle.dumps(list(range(999)), protocol=4)), "is a pickle", FETCH),
    "gguf": BadFile(_write(b"GGUF" + (3).to_bytes(4, "little") + bytes(64)), "is a GGUF file", FETCH),
    "garbage-length": BadFile(_write(b"\xff" * 8 + bytes(64)), "is not a safetensors file", FETCH),
    "garbage-header": BadFile(
        _write((40).to_bytes(8, "little") + b"\x00\x01" * 40), "is not a safetensors file", FETCH
    ),
    "json-list": BadFile(_write((8).to_bytes(8, "little") + b"[1,2,3] "), "is not a safetensors file", FETCH),
    "json-of-something-else": BadFile(
        _write((24).to_bytes(8, "little") + b'{"prompt": "a koala"}   '), "is not a safetensors file", FETCH
    ),
    "json-too-deep": BadFile(
        _write((100_000).to_bytes(8, "little") + b"[" * 100_000), "is not a safetensors file", FETCH
    ),
}


def _tensors(make: Callable[[], Shapes], dtype: str = "F16") -> Callable[[Path], object]:
    return lambda path: files.write(path, make(), dtype)


BAD: dict[str, BadFile] = {
    **{name: BadFile(_tensors(make), says, do) for name, (make, says, do) in OTHER_MODELS.items()},
    **{name: BadFile(_tensors(make, dtype), says, do) for name, (make, dtype, says, do) in BROKEN.items()},
    **UNREADABLE,
}
"""Every bad file by name."""
