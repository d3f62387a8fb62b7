"""An adapter on a model, in each way that the study compares: a pipeline that draws with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from tools.tiny import pipeline

from ....koala.architecture.layout import KOALA_TINY
from ....koala.lora.plan import inspect_lora
from ... import single_file
from ...carry.control import Acting
from ...carry.lora import Lora
from ...carry.samples import Acts
from ...carry.settings import Settings
from ...carry.source import open_source
from ...carry.weights import WeightChange
from .projection import projected


@dataclass(frozen=True)
class Family:
    """sdxl-tiny's folder and a koala-tiny's file, and what that is called."""

    teacher: Path
    student: Path
    name: str

    def whole(self) -> StableDiffusionXLPipeline:
        """sdxl-tiny, fp32."""
        return pipeline.load(self.teacher)

    def part(self) -> StableDiffusionXLPipeline:
        """The koala-tiny, fp32."""
        return single_file.pipeline(self.student, self.teacher / "tokenizer")


@contextmanager
def on_teacher(family: Family, given: Settings, hints: Tensor | None) -> Iterator[StableDiffusionXLPipeline]:
    """SDXL with what is carried over. ``hints``: what a ControlNet sees, RGB, uint8 [n, 3, size, size], n the batch."""
    model, source = family.whole(), open_source(given)
    source.change.texts(model)
    with source.change.on_teacher(model.unet, source.teacher.file) as acts, seeing(acts, hints):
        yield model


@contextmanager
def by_place(family: Family, given: Settings, hints: Tensor | None) -> Iterator[StableDiffusionXLPipeline]:
    """The KOALA with it by lineage, as KOALA LoRA Loader and KOALA ControlNet Loader apply it."""
    model, source = family.part(), open_source(given)
    if isinstance(source.change, WeightChange):
        add(model, source.change.of_student(source.student.tensor))
        source.change.texts(model)
        yield model
    else:
        with seeing(source.change.on_student(model.unet, source.student), hints):
            yield model


@contextmanager
def by_projection(family: Family, given: Settings) -> Iterator[StableDiffusionXLPipeline]:
    """The KOALA with SDXL's changes of weights projected onto its own."""
    model, source = family.part(), open_source(given)
    assert isinstance(source.change, WeightChange)
    own, whole, line = source.student.tensor, source.teacher.file.tensor, source.lineage
    add(model, projected(source.change.of_student(own), lambda name: whole(line.ancestor(name)), own))
    source.change.texts(model)
    yield model


@contextmanager
def from_file(family: Family, path: Path) -> Iterator[StableDiffusionXLPipeline]:
    """The KOALA with a LoRA of its own."""
    model, plan = family.part(), inspect_lora(path, KOALA_TINY)
    lora = Lora(plan, plan)
    add(model, list(lora.of_student(model.unet.get_parameter)))
    lora.texts(model)
    yield model


def seeing(acts: Acts, hints: Tensor | None) -> AbstractContextManager[object]:
    """A ControlNet acts, in batches of as many images as there are hints."""
    if hints is None:
        return nullcontext()
    assert isinstance(acts, Acting)
    return replace(acts, images=hints)(torch.arange(len(hints)))


@torch.no_grad()
def add(model: StableDiffusionXLPipeline, changes: Iterable[tuple[str, Tensor]]) -> None:
    """Add changes to a U-Net's weights, by name."""
    for name, change in changes:
        model.unet.get_parameter(name).add_(change)
