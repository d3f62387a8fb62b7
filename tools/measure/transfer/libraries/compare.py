"""A library's file on KOALA, against the library's own merge."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import torch

from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.layout import Layout
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.lora.report import report
from tools.measure.transfer.libraries.sdxl import Kind, Sdxl, fresh, fresh_koala, original, text_weights, unet_weights
from tools.measure.transfer.models import baked, clip, pair, small, warnings_of_host
from tools.synthetic.adapters import State

BOUND = 1e-4
"""Largest difference of a weight that counts as none, as a share of its own largest change; fp32."""


class Outcome(NamedTuple):
    """What became of the weights and biases that the library changed: how many got its change, another one, or none;
    the largest difference of those that are right, as a share of their change; how many modules they are of, and how
    many modules have one that got none. A weight that should have stayed counts as wrong if it did not."""

    right: int
    wrong: int
    untouched: int
    difference: float
    modules: int
    left: int


@dataclass(frozen=True)
class Compared:
    """A kind of file on one KOALA: U-Net, text encoders, the loader's report, and what ComfyUI logged meanwhile. For a
    file that is refused, the error in place of a report, and no outcomes."""

    unet: Outcome
    text: Outcome
    report: str
    logged: tuple[str, ...]
    refused: bool = False

    @property
    def applied(self) -> int:
        """How many modules of the U-Net the report says were applied."""
        found = re.search(r"^U-Net on .*?: (\d+) applied", self.report, re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def text_applied(self) -> int:
        """The same of the text encoders."""
        found = re.search(r"^text encoders: (\d+) ", self.report, re.MULTILINE)
        return int(found[1]) if found else 0


def written(kind: Kind, folder: Path, trained_on: Callable[[], Sdxl] = fresh) -> tuple[Path, Sdxl]:
    """A kind's file, and SDXL with what its library merged. ``trained_on``: makes what the adapter is attached to."""
    with torch.inference_mode(False), torch.enable_grad():  # as training scripts run
        sdxl = trained_on()
        return kind.write(sdxl, folder), sdxl


def compare(kind: Kind, *koalas: Layout) -> list[Compared]:
    """A kind's file by KOALA LoRA Loader on each of some KOALAs that are cut out of the same SDXL."""
    with tempfile.TemporaryDirectory(prefix="koala-adapters-") as folder:
        path, merged = written(kind, Path(folder))
        return [_compare(path, koala, kind.strength, merged, lineage(small(koala)).teacher) for koala in koalas]


def compare_own(kind: Kind, koala: Layout) -> Compared:
    """The same for an adapter that was trained on the KOALA itself."""
    with tempfile.TemporaryDirectory(prefix="koala-adapters-") as folder:
        path, merged = written(kind, Path(folder), partial(fresh_koala, koala))
        return _compare(path, koala, kind.strength, merged, small(koala))


@torch.inference_mode()
def _compare(path: Path, koala: Layout, strength: float, merged: Sdxl, trained_on: Layout) -> Compared:
    """A file on a KOALA. ``merged``: what the library merged into a model whose U-Net has the layout ``trained_on``."""
    with warnings_of_host() as said:
        try:
            applied = apply_lora(pair(koala)[1], clip(), path, strength, strength)
        except CheckpointError as error:
            none = outcome({}, {}, {})
            return Compared(none, none, str(error), tuple(said), refused=True)
        ours, ours_text = baked(applied.model), _baked_text(applied.clip)
    ancestry = lineage(small(koala))
    before, wanted = ancestry.cut(unet_weights(original()), "comfy"), unet_weights(merged, trained_on)
    if trained_on == ancestry.teacher:
        wanted = ancestry.cut(wanted, "comfy")
    return Compared(
        outcome(ours, wanted, before),
        outcome(ours_text, text_weights(merged), text_weights(original())),
        report(applied.plan, applied.text),
        tuple(said),
    )


def outcome(ours: Mapping[str, torch.Tensor], wanted: State, before: State) -> Outcome:
    """What became of each weight. ``wanted``: as the library merged it; ``before``: without the adapter."""
    right = wrong = untouched = 0
    largest = 0.0
    modules, left = set(), set()
    for name, origin in before.items():
        change = float((wanted[name] - origin).abs().max())
        difference = float((ours[name] - wanted[name]).abs().max())
        if not change:
            wrong += bool(difference)
            continue
        modules.add(name.rpartition(".")[0])
        if difference <= BOUND * change:
            right += 1
            largest = max(largest, difference / change)
        elif torch.equal(ours[name], origin):
            untouched += 1
            left.add(name.rpartition(".")[0])
        else:
            wrong += 1
    return Outcome(right, wrong, untouched, largest, len(modules), len(left))


def _baked_text(encoders: Any) -> State:
    """A CLIP's weights with its patches merged, ComfyUI's names."""
    patcher = encoders.patcher
    return {
        key: comfy.lora.calculate_weight(patcher.patches.get(key, []), weight.float().clone(), key)
        for key, weight in patcher.model_state_dict().items()
    }
