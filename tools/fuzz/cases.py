"""One case of the campaign: a base, damaged in a way that its seed and its number settle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from tools.fuzz import mutations
from tools.fuzz.bases import Base, contents

SHARES = {"checkpoint": 3, "U-Net": 2, "text encoder": 3, "VAE": 3, "folder": 4, "LoRA": 7}
"""How often each kind is drawn."""


@dataclass(frozen=True)
class Case:
    """A damaged file or folder, not yet on the disk."""

    number: int
    base: Base
    contents: Mapping[str, bytes]
    """Path below the case's folder, or "" for a file of its own -> bytes."""
    did: str
    """What was done to it, in words."""


def case(bases: Sequence[Base], seed: int, number: int) -> Case:
    """The same for the same seed and number, whatever ran before."""
    random = Random(f"{seed}:{number}")
    kind = random.choices(list(SHARES), list(SHARES.values()))[0]
    base = random.choice([one for one in bases if one.kind == kind])
    files = contents(base)
    if base.configs and random.random() < 0.6:
        return Case(number, base, *_damaged_config(base, files, random))
    path = random.choice(list(base.weights))
    if random.random() < 0.4:
        files[path], did = random.choice(mutations.ON_BYTES)(files[path], random)
    else:
        weights = base.weights[path].copy()
        did = "; ".join(_mutated(weights, random) for _ in range(random.choice([1, 1, 1, 2])))
        files[path] = weights.content()
    return Case(number, base, files, f"{path}: {did}" if path else did)


def _mutated(weights: mutations.Weights, random: Random) -> str:
    return random.choice(mutations.ON_WEIGHTS)(weights, random) if weights.tensors else "no tensor left"


def _damaged_config(base: Base, files: dict[str, bytes], random: Random) -> tuple[dict[str, bytes], str]:
    """A setting, a whole JSON file, or a file that is not there."""
    way = random.random()
    if way < 0.65:
        path = next(path for path in base.configs if path.startswith("scheduler"))
        config = dict(base.configs[path])
        did = "; ".join(mutations.scheduler(config, random) for _ in range(random.choice([1, 1, 2])))
        files[path] = json.dumps(config).encode()
    elif way < 0.9:
        path = random.choice(list(base.configs))
        files[path], did = mutations.odd_json(files[path], random)
    else:
        path, did = random.choice(list(files)), "not there"
        del files[path]
    return files, f"{path}: {did}"
