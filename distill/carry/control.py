"""What is carried over, where it is an SDXL ControlNet: what is learned are the 1x1 convolutions behind it.

A ControlNet adds a residual to each skip connection and to the middle, each out of a 1x1 convolution of its own
("zero convolution"). Learned anew are those whose skip connection the KOALA has. Another gain or 1x1 convolution behind
such a residual would be the same as other numbers here: it is folded into the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from ...koala.architecture.control_keys import MIDDLE, control_tensors, output_modules
from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage, lineage
from ...koala.files.control_weights import ControlWeights, open_control
from ...koala.files.conventions import CARRY_KEY
from ...koala.files.dtypes import TORCH_DTYPES
from ...koala.files.export import unet_config
from ...koala.files.header import read_header
from ...koala.files.unet_weights import UNetWeights
from ...koala.lora.adjustable import Adjustable
from ...koala.lora.fit import Changes
from ..errors import UserError
from .hints import Hints, open_hints
from .samples import Acts
from .settings import Settings
from .student import Learner
from .write import write_file


@dataclass(frozen=True)
class Control:
    """A ControlNet's file, and the control images; ``dtype`` is that in which it computes."""

    file: ControlWeights
    lineage: Lineage
    hints: Hints
    dtype: torch.dtype

    kind: ClassVar[str] = "ControlNet"

    @property
    def path(self) -> Path:
        """Its file."""
        return self.file.path

    @property
    def files(self) -> list[Path]:
        """The same, alone."""
        return [self.path]

    @property
    def modules(self) -> tuple[str, ...]:
        """diffusers' names of the convolutions whose residuals the KOALA takes, in its own order."""
        return output_modules(self.lineage.skips, self.lineage.student.middle is not None)

    def report(self) -> str:
        """Which residuals are learned anew, and which the KOALA lacks."""
        student, takes = self.lineage.student, self.lineage.skips
        lacks = [skip for skip in lineage(self.lineage.teacher).skips if skip not in takes]
        middle = "has no middle block" if student.middle is None else "takes that of the middle, too"
        return (
            f"{self.path.name}: an SDXL ControlNet; {name(student)} takes its residuals "
            f"{', '.join(map(str, takes))} (counted from 0), lacks the skip connections for "
            f"{', '.join(map(str, lacks))}, and {middle}. It runs in each forward pass of either network, whose memory "
            f"below is with its {self.bytes / 1e9:.2f} GB; {len(self.hints.images)} control images are used"
        )

    @property
    def bytes(self) -> int:
        """Of its weights in memory."""
        return self.dtype.itemsize * sum(prod(tensor.shape) for tensor in control_tensors(self.file.layout))

    def count(self, given: Settings) -> int:
        """How many numbers are learned."""
        return sum(number.numel() for number in self._own(self.modules).values())

    def result(self, given: Settings) -> str:
        """The new file in a word or two."""
        return f"{len(self.modules)} convolutions learned anew"

    def texts(self, pipeline: Any) -> tuple[Changes, str]:
        """A ControlNet changes no text encoder."""
        return {}, ""

    @contextmanager
    def on_teacher(self, unet: UNet2DConditionModel, file: UNetWeights) -> Iterator[Acts]:
        """What SDXL takes: every residual."""
        yield self._acting(unet, self._own(self._every, unet.device))

    def on_student(self, unet: UNet2DConditionModel, file: UNetWeights) -> Acts:
        """What KOALA ControlNet Loader makes of it: each residual at its own skip connection."""
        return self._acting(unet, self._own(self.modules, unet.device))

    def learner(self, unet: UNet2DConditionModel, file: UNetWeights, given: Settings) -> Learner:
        """The numbers of the convolutions, which begin as they are in the file."""
        unet.requires_grad_(False)
        start = self._own(self.modules)
        places = {key: nn.Parameter(number.to(unet.device, copy=True)) for key, number in start.items()}
        return Learner(start, Adjustable(places), acts=self._acting(unet, places))

    def rounded(self, numbers: Changes) -> Changes:
        """The numbers as the new file has them: in the types of the old one. Raises UserError for one that such a type
        cannot hold."""
        found = {key: number.to(self.file.tensor(key).dtype).float() for key, number in numbers.items()}
        if bad := next((key for key, number in found.items() if not number.isfinite().all()), None):
            raise UserError(
                f"the new ControlNet was not written: {bad} has a number that the file's type cannot hold. Take "
                f"--method fit."
            )
        return found

    def write(self, path: Path, numbers: Changes, text: Changes, origin: Mapping[str, Any], given: Settings) -> None:
        """Write the ControlNet with these numbers in the places of its own, and with its own metadata."""
        own = {key: self.file.tensor(key) for key in self.file.names}
        new = {key: number.to(own[key].dtype) for key, number in numbers.items()}
        state = {self.file.names[key]: tensor for key, tensor in (own | new).items()}
        write_file(path, state, {**read_header(self.path).metadata, CARRY_KEY: json.dumps(origin)})

    @property
    def _every(self) -> tuple[str, ...]:
        return output_modules(lineage(self.lineage.teacher).skips, middle=True)

    def _own(self, modules: tuple[str, ...], device: torch.device | str = "cpu") -> Changes:
        """The file's numbers, fp32."""
        names = [f"{module}.{part}" for module in modules for part in ("weight", "bias")]
        return {key: self.file.tensor(key).to(device, torch.float32) for key in names}

    def _acting(self, unet: UNet2DConditionModel, numbers: Mapping[str, Tensor]) -> Acts:
        return Acting(unet, features(self.file, self.dtype).to(unet.device), numbers, self.hints.images)


@dataclass(frozen=True)
class Acting:
    """A ControlNet on a U-Net: before each forward pass it computes the residuals, which the U-Net adds.

    ``network`` gives features of all skip connections and of the middle; ``numbers`` are the weights and biases of the
    convolutions for those that the U-Net has, in its order. They may need a gradient: the features do not.
    """

    unet: UNet2DConditionModel
    network: ControlNetModel
    numbers: Mapping[str, Tensor]
    images: Tensor

    @contextmanager
    def __call__(self, hints: Tensor) -> Iterator[None]:
        """It acts while this is active, with these control images; a batch may be a multiple of them."""
        images = self.images[hints]

        def added(_: nn.Module, positional: tuple[Tensor, Tensor], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return positional, named | self._residuals(images, *positional, named)

        hook = self.unet.register_forward_pre_hook(added, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _residuals(self, images: Tensor, noisy: Tensor, time: Tensor, named: Mapping[str, Any]) -> dict[str, Any]:
        dtype = self.network.dtype
        shown = images.to(noisy.device, dtype).div(255).repeat(len(noisy) // len(images), 1, 1, 1)
        with torch.no_grad():
            skips, middle = self.network(
                noisy.to(dtype),
                time,
                named["encoder_hidden_states"].to(dtype),
                shown,
                added_cond_kwargs=named["added_cond_kwargs"],
                return_dict=False,
            )
        every = dict(zip(output_modules(range(len(skips)), middle=True), (*skips, middle), strict=True))
        modules = dict.fromkeys(key.rpartition(".")[0] for key in self.numbers)
        found = {module: self._convolved(module, every[module]).to(noisy.dtype) for module in modules}
        nothing = noisy.new_zeros(())  # diffusers adds one after a missing middle block, too
        of_middle = found.pop(MIDDLE, nothing)
        return {"down_block_additional_residuals": tuple(found.values()), "mid_block_additional_residual": of_middle}

    def _convolved(self, module: str, feature: Tensor) -> Tensor:
        weight, bias = (self.numbers[f"{module}.{part}"] for part in ("weight", "bias"))
        return functional.conv2d(feature.to(weight.dtype), weight, bias)


def features(file: ControlWeights, dtype: torch.dtype) -> ControlNetModel:
    """A ControlNet without its last convolutions: what goes into them, of every skip connection and of the middle."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(file.layout))
        network = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    network.controlnet_down_blocks = nn.ModuleList(nn.Identity() for _ in network.controlnet_down_blocks)
    network.controlnet_mid_block = nn.Identity()
    every = network.state_dict()
    network.load_state_dict({key: file.tensor(key).to(dtype) for key in every}, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def open_change(file: Path, teacher: Layout, line: Lineage, given: Settings) -> Control:
    """Read a ControlNet's header, and the control images. Raises UserError or CheckpointError for unusable ones."""
    for option, has, why in (
        ("--keep", given.keep, "a ControlNet acts on every prompt"),
        ("--rank", given.rank, "a ControlNet's convolutions have none"),
    ):
        if has:
            raise UserError(f"{option} goes with a LoRA, and {given.lora} is a ControlNet: {why}. Leave it out.")
    weights = open_control(file)
    layout = weights.layout
    if _layers(layout) == _layers(line.student):
        raise UserError(
            f"{given.lora} was made for {name(line.student)} itself, with as many residuals as that takes; expected an "
            f"SDXL ControlNet. Use it as it is."
        )
    if _sizes(layout) != _sizes(teacher):
        raise UserError(
            f"{given.lora} is a ControlNet for a {name(layout)}, of other widths or layers than the teacher, a "
            f"{name(teacher)}; expected one for it. Give another one, or another --teacher."
        )
    try:
        unet_config(layout)
    except ValueError as error:
        raise UserError(f"{given.lora} is a ControlNet of an unknown kind: {error}") from None
    return Control(weights, line, open_hints(given), TORCH_DTYPES[given.dtype])


def _sizes(layout: Layout) -> tuple[object, ...]:
    """What a ControlNet and its U-Net have in common: not the depth of their transformers."""
    return layout.channels, layout.context, layout.added, layout.in_channels, _layers(layout)


def _layers(layout: Layout) -> list[int]:
    return [len(stage) for stage in layout.down]
