"""What is carried over as changes of weights: a LoRA, or a fine-tuned SDXL. What is learned is a LoRA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from diffusers import UNet2DConditionModel
from torch import Size, Tensor

from ...koala.architecture.keys import Shape, tensors
from ...koala.architecture.layout import Layout
from ...koala.files.unet_weights import UNetWeights
from ...koala.lora.adjustable import adjustable
from ...koala.lora.factors import factors, lora_tensors
from ...koala.lora.fit import Changes
from . import write
from .samples import Acts, alone
from .settings import LEAST_RANK, Settings
from .student import Learner

Weight = Callable[[str], Tensor]
"""diffusers' name of a weight or bias -> the unchanged tensor."""


class WeightChange(ABC):
    """What it makes of SDXL's weights, and by lineage of the KOALA's; see ``source.Change``."""

    kind: ClassVar[str] = "LoRA"
    hints: ClassVar[None] = None
    bytes: ClassVar[int] = 0

    @property
    @abstractmethod
    def rank(self) -> int:
        """The largest that it has, or what stands for it."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The KOALA's."""

    @property
    @abstractmethod
    def places(self) -> set[str]:
        """ComfyUI's names of the KOALA's modules that it changes."""

    @abstractmethod
    def of_teacher(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """What it makes of SDXL's weights and biases, fp32, one at a time."""

    @abstractmethod
    def of_student(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """What it adds to the KOALA's by lineage, fp32, one at a time."""

    @contextmanager
    def on_teacher(self, unet: UNet2DConditionModel, file: UNetWeights) -> Iterator[Acts]:
        """SDXL's U-Net is changed while this is active, each weight in fp32 before it is rounded."""
        changed = []
        for parameter, new in self.of_teacher(file.tensor):
            _put(unet, parameter, new)
            changed.append(parameter)
        try:
            yield alone
        finally:
            for parameter in changed:
                _put(unet, parameter, file.tensor(parameter))

    def on_student(self, unet: UNet2DConditionModel, file: UNetWeights) -> Acts:
        """Change the KOALA's U-Net by lineage."""
        for parameter, change in self.of_student(file.tensor):
            own = unet.get_parameter(parameter)
            _put(unet, parameter, own + change.to(own.device))
        return alone

    def learner(self, unet: UNet2DConditionModel, file: UNetWeights, given: Settings) -> Learner:
        """The factors' places, and what they begin with."""
        start = factors(self.of_student(file.tensor), self._rank(given))
        return Learner(start, adjustable(unet, start))

    def count(self, given: Settings) -> int:
        """How many numbers are learned."""
        every = (tensor for tensor in tensors(self.layout) if tensor.comfy.removesuffix(".weight") in self.places)
        return sum(_numbers(tensor.shape, self._rank(given)) for tensor in every)

    def result(self, given: Settings) -> str:
        """The new file in a word or two."""
        return f"rank {self._rank(given)}"

    def rounded(self, numbers: Changes) -> Changes:
        """The numbers as the file has them, fp32. Raises UserError for one that it cannot hold."""
        return write.rounded(numbers)

    def write(self, path: Path, numbers: Changes, text: Mapping[str, Tensor], origin: Any, given: Settings) -> None:
        """Write the new file; see ``write.write``."""
        write.write(path, lora_tensors(numbers, self.layout) | dict(text), self._rank(given), origin)

    def _rank(self, given: Settings) -> int:
        """Of the new LoRA."""
        return given.rank or max(LEAST_RANK, 2 * self.rank)


def _put(unet: UNet2DConditionModel, parameter: str, value: Tensor) -> None:
    """Give a U-Net another weight or bias. Not in place: the one before may be the file itself, mapped into memory."""
    own = unet.get_parameter(parameter)
    own.data = value.to(own.device, own.dtype)


def _numbers(shape: Shape, rank: int) -> int:
    """Of a weight's factors; a norm's are its own."""
    if len(shape) == 1:
        return shape[0]
    rows, columns = shape[0], Size(shape[1:]).numel()
    return min(rank, rows, columns) * (rows + columns)
