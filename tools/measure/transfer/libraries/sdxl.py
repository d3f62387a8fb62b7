"""A narrow SDXL as training libraries see it: diffusers' U-Net and transformers' two text encoders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from koala_sdxl import koala_loader
from koala_sdxl.distill import single_file
from koala_sdxl.koala.architecture.keys import renaming
from koala_sdxl.koala.architecture.layout import Layout
from koala_sdxl.koala.architecture.lineage import lineage
from tools.harness import testhost
from tools.measure.transfer.models import sdxl_weights, small
from tools.synthetic.adapters import SMALL_SDXL, State

Part = str
"""An attribute of ``Sdxl``; diffusers' name of the same part of a pipeline."""
PARTS: tuple[Part, ...] = ("unet", "text_encoder", "text_encoder_2")
SIZE = 0.2
"""Deviation of an adapter's random numbers: changes of about a tenth of a random weight's size."""

ATTENTION = r".*\.(attn1\.to_q|attn2\.to_k|attn2\.to_out\.0)$"
"""Three matrices of each transformer block: square, as wide as the text, with a bias."""
CONVOLUTIONS = r".*(resnets\.\d\.conv1|conv_shortcut|samplers\.0\.conv|attentions\.\d\.proj_in)$"


@dataclass
class Sdxl:
    """The parts of an SDXL that adapters change, each a module; what a library merges into one stays in it."""

    unet: Any
    text_encoder: Any
    text_encoder_2: Any


@dataclass(frozen=True)
class Kind:
    """A kind of adapter file.

    ``write`` attaches an adapter of random numbers to a fresh SDXL, saves it into a folder by the library's own
    function, merges it into the SDXL by the library's own function with ``strength``, and returns the file.
    ``refused``: what the loader's error says of a kind that it does not apply at all. ``left_out``: what its report
    says of the modules that it does not apply. Both are regular expressions.
    """

    library: str
    name: str
    write: Callable[[Sdxl, Path], Path]
    strength: float = 1.0
    refused: str = ""
    left_out: str = ""

    def __str__(self) -> str:
        return f"{self.library}, {self.name}"


@cache
def original() -> Sdxl:
    """Random weights in the U-Net, koala-tiny's text encoders; nobody changes it."""
    with torch.inference_mode(False):  # libraries train, which no tensor of inference mode allows
        made = single_file.pipeline(koala_loader.BUILT_IN, testhost.test_host().tokenizer, with_unet=False)
        weights = {name: tensor.clone() for name, tensor in sdxl_weights().items()}
        return Sdxl(single_file.unet(weights), made.text_encoder, made.text_encoder_2)


def fresh() -> Sdxl:
    """A copy of the original, to attach adapters to and to merge them into."""
    return copy.deepcopy(original())


def fresh_koala(koala: Layout) -> Sdxl:
    """The same, with the U-Net of a KOALA that is cut out of the original's."""
    unet = {name: tensor.clone() for name, tensor in lineage(small(koala)).cut(sdxl_weights(), "comfy").items()}
    return Sdxl(single_file.unet(unet), *map(copy.deepcopy, (original().text_encoder, original().text_encoder_2)))


def randomize(parameters: Iterable[torch.nn.Parameter], seed: int = 0) -> None:
    """Add random numbers to an adapter's parameters, in place: libraries begin with one that changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(SIZE * torch.randn(parameter.shape, generator=generator))


def interpolate(module: Any, origin: Mapping[str, torch.Tensor], strength: float) -> None:
    """Leave a share of a merged change in a module, in place: what a strength means where a library has none."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(origin[name] + strength * (tensor - origin[name]))


def unet_weights(sdxl: Sdxl, layout: Layout = SMALL_SDXL) -> State:
    """The U-Net's tensors under ComfyUI's names. ``layout``: its own."""
    names = renaming(layout, "diffusers", "comfy")
    return {names[name]: tensor.detach() for name, tensor in sdxl.unet.state_dict().items()}


def text_weights(sdxl: Sdxl) -> State:
    """The text encoders' tensors under ComfyUI's names."""
    return {
        f"{own}.transformer.{name if name.startswith('text_') else f'text_model.{name}'}": tensor.detach()
        for part, own in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"))
        for name, tensor in getattr(sdxl, part).state_dict().items()
    }
