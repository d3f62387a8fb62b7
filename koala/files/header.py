"""The header of a safetensors file, read once by the safetensors library, and what a file without one is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..architecture.keys import Shape
from .bad_files import describe_bad_file
from .conventions import UNET_PREFIX, label
from .stamp import Stamp, stamp


class CheckpointError(ValueError):
    """A file that cannot be used; the first line names it, what it is, what was expected and what to do."""

    __module__ = "koala"  # the host prefixes an error's text with this; a pack's true module name is a path


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself. Two headers are equal where they are of the same path."""

    path: Path
    dtypes: Mapping[str, str] = field(repr=False, compare=False)
    """Tensor name -> the library's name of its type, such as "F16"; in the order in which the tensors lie."""
    shapes: Mapping[str, Shape] = field(repr=False, compare=False)
    """Tensor name -> shape, in the same order."""
    metadata: Mapping[str, str] = field(repr=False, compare=False)
    offsets: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Tensor name -> where its data begins, in bytes from the beginning of the file."""
    stamp: Stamp | None = field(default=None, repr=False, compare=False)
    """Of the file whose header this is; None for a header that is of no file."""

    def under(self, prefix: str) -> dict[str, Shape]:
        """Shapes of the tensors whose names begin with ``prefix``, which is taken off."""
        return {key[len(prefix) :]: shape for key, shape in self.shapes.items() if key.startswith(prefix)}

    @property
    def unet_prefix(self) -> str:
        """What the names of a U-Net's tensors begin with: nothing in a file that holds a U-Net alone."""
        return UNET_PREFIX if any(key.startswith(UNET_PREFIX) for key in self.shapes) else ""


@dataclass(frozen=True)
class Source:
    """Where one model's tensors lie: a file, by its header, and the prefix of their names in it."""

    header: Header
    prefix: str = ""

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of these tensors, by their names without the prefix."""
        return self.header.under(self.prefix)


def read_header(path: Path, wanted: str = "KOALA weights") -> Header:
    """Open a safetensors file once and read its header; no tensor is read.

    Args:
        path: the file.
        wanted: what an error says was expected in the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is empty, cut short, a web page, a pickle, or otherwise not a safetensors file; or the
            system does not let it be read.
    """
    try:
        return _read_header(path, wanted)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{label(path)} cannot be read ({error.strerror or error}); expected a .safetensors file of {wanted}. "
            f"Check that ComfyUI may read it, or choose another file."
        ) from None


def _read_header(path: Path, wanted: str) -> Header:
    if not path.is_file():
        path.stat()  # raises FileNotFoundError
        raise CheckpointError(describe_bad_file(path, wanted, "not a file"))
    path.open("rb").close()  # the library calls whatever it may not open "not found"
    before = stamp(path)
    try:
        with safe_open(path, framework="np") as file:
            offsets = _offsets(path)
            slices = {name: file.get_slice(name) for name in offsets}
            dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
            return Header(path, dtypes, shapes, file.metadata() or {}, offsets, before)
    except SafetensorError as error:
        raise CheckpointError(describe_bad_file(path, wanted, str(error))) from None


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor's data begins, in bytes from the beginning of a file that the library found good; in the order
    in which they lie. (The library tells the order from version 0.6 on, the places never.)"""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in table.items() if name != "__metadata__"}
    return dict(sorted(starts.items(), key=lambda item: item[1]))
