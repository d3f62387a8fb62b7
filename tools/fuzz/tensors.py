"""Where each loaded tensor comes from in its file, learnt from an undamaged load, and whether it is still equal to it.

The map is found by the numbers alone, which are random and so tell every tensor apart: it has no table of names in
common with the pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from tools.fuzz.bases import Base, Weights
from tools.fuzz.files import STORED_NAMES, WEIGHTS

State = dict[str, torch.Tensor]
MADE = ("clip_l.logit_scale", "clip_g.logit_scale", "clip_l.transformer.text_projection.weight")
"""Loaded tensors that need not be in a file: ComfyUI makes them, and SDXL does not use them."""
UNUSED = ("logit_scale", "position_ids", "text_projection.weight", "text_projection")
"""Ends of names that a text encoder's file may have without their being loaded."""


class Place(NamedTuple):
    """A file's tensor, and which part of it, or which way round, is loaded."""

    tensor: str
    """``path:name``."""
    part: str


@dataclass(frozen=True)
class Clean:
    """An undamaged base: where each loaded tensor lies, and all the file's tensors."""

    places: Mapping[str, Place]
    names: frozenset[str]


PARTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.T.contiguous(),
    "third 0": lambda tensor: tensor.chunk(3)[0],
    "third 1": lambda tensor: tensor.chunk(3)[1],
    "third 2": lambda tensor: tensor.chunk(3)[2],
}


def loaded_tensors(loaded: Any) -> State:
    """Every weight of a MODEL, CLIP and VAE, by names that tell them apart."""
    found: State = {}
    for part in loaded:
        network = next(
            getattr(part, name)
            for name in ("cond_stage_model", "first_stage_model", "model")
            if getattr(part, name, None) is not None
        )
        found |= getattr(network, "diffusion_model", network).state_dict()
    return found


def _own(base: Base, loaded: Any) -> State:
    return {name: tensor for name, tensor in loaded_tensors(loaded).items() if name.startswith(base.own)}


def file_tensors(base: Base, path: Path) -> State:
    """Every tensor of a case's files, as ``path:name``."""
    found: State = {}
    for place in base.weights:
        file = path / place if place else path
        if file.is_file():
            found |= {f"{place}:{name}": tensor for name, tensor in load_file(file).items()}
    return found


def learn(base: Base, path: Path, loaded: Any) -> Clean:
    """The map of an undamaged base. Raises LookupError for a loaded tensor that the file does not have."""
    files, places = file_tensors(base, path), {}
    index: dict[bytes, Place] = {}
    for name, tensor in files.items():
        for part in _parts(tensor):
            index.setdefault(_bytes(PARTS[part](tensor).float()), Place(name, part))
    for name, tensor in _own(base, loaded).items():
        place = index.get(_bytes(tensor.float()))
        if place:
            places[name] = place
        elif name not in MADE:
            raise LookupError(f"{base.name}: {name} is not in the file")
    return Clean(places, frozenset(files))


def differences(base: Base, clean: Clean, path: Path, loaded: Any) -> Iterator[str]:
    """What of a load is not what its file has."""
    files, got = file_tensors(base, path), _own(base, loaded)
    used: set[str] = set()
    for name, tensor in got.items():
        place = clean.places.get(name)
        if place is None:
            if name not in MADE and not any(_same(tensor, other) for other in files.values()):
                yield f"{name} is in no file"
            continue
        found = _found(place.tensor, files)
        used.add(found)
        yield from _faults(name, tensor, place._replace(tensor=found), files)
    for name in files.keys() - used:
        if name in {place.tensor for place in clean.places.values()}:
            yield f"{name} was not loaded"
        elif name not in clean.names and _belongs(name, clean) and not name.endswith(UNUSED):
            yield f"{name} is in the file beyond the model's tensors, and was not loaded"


def _found(name: str, files: State) -> str:
    """A tensor's name in damaged files: its own, or that with one beginning more, as whole checkpoints have."""
    path, _, key = name.partition(":")
    longer = (other for other in files if other.startswith(f"{path}:") and other.endswith(f".{key}"))
    return name if name in files else next(longer, name)


def _faults(name: str, tensor: torch.Tensor, place: Place, files: State) -> Iterator[str]:
    source = files.get(place.tensor)
    if source is None:
        yield f"{name} was loaded, {place.tensor} is not in the file"
    elif STORED_NAMES[source.dtype] not in WEIGHTS:
        yield f"{place.tensor}, stored as {STORED_NAMES[source.dtype]}, became weights"
    elif _axes(PARTS[place.part](source).shape) != _axes(tensor.shape):
        yield f"{place.tensor} of {list(source.shape)} became {name} of {list(tensor.shape)}"
    elif not _same(tensor, PARTS[place.part](source)):
        yield f"{name} differs from {place.tensor}"


def _belongs(name: str, clean: Clean) -> bool:
    """Whether a tensor's name begins as those of the models that were read."""
    path, _, key = name.partition(":")
    beginnings = {
        (place.tensor.partition(":")[0], _beginning(place.tensor.partition(":")[2])) for place in clean.places.values()
    }
    return any(path == other and key.startswith(beginning) for other, beginning in beginnings)


def _beginning(key: str) -> str:
    prefixes = ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1.", "first_stage_model.")
    return next((prefix for prefix in prefixes if key.startswith(prefix)), "")


def _same(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    """Bit for bit, in the type that it was loaded into."""
    if loaded.numel() != stored.numel() or not stored.is_floating_point():
        return False
    return _bytes(loaded) == _bytes(stored.to(loaded.dtype))


def _bytes(tensor: torch.Tensor) -> bytes:
    return Weights.of({"": tensor.detach()}).tensors[""].data


def _axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _parts(tensor: torch.Tensor) -> Iterator[str]:
    yield "whole"
    if tensor.ndim == 2 and min(tensor.shape) > 1:
        yield "transposed"
    if tensor.ndim and len(tensor) % 3 == 0 and len(tensor) > 3:
        yield from ("third 0", "third 1", "third 2")
