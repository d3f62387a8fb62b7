"""A KOALA's U-Net as it is trained: ComfyUI's own network in fp32, a copy, in which gradients can be computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..protocols import Conditioning, Model
from .samples import Samples
from .weights import Weights

CONDITIONS = ("c_crossattn", "y")
"""ComfyUI's names of what the U-Net gets of a text: its tokens, and pooled text with the image's size."""
MOST_WEIGHT = 15.0
"""Of a sample's squared error; the trainer's default."""

Conditions = dict[str, comfy.conds.CONDRegular]
"""What the U-Net gets of a text, by the names of ``CONDITIONS``."""


class Network:
    """A copy of a KOALA's U-Net with its patches, fp32, on the device; make and use it outside inference mode.

    All other models leave the device for it. What is set on the MODEL besides weight patches is not in it.
    """

    def __init__(self, koala: Model) -> None:
        self._sampling: Any = koala.get_model_object("model_sampling")
        self._conditions: Any = koala.model.extra_conds
        config = {**koala.model.model_config.unet_config, "dtype": torch.float32}
        self.unet = UNetModel(**config, device=torch.device("cpu"), operations=comfy.ops.disable_weight_init)
        own, weights = Weights(koala), {}
        for name in koala.model.diffusion_model.state_dict():
            comfy.model_management.throw_exception_if_processing_interrupted()
            weights[name] = own[name]
        # the layers may have none before: with dynamic VRAM the host makes them so
        self.unet.load_state_dict(weights, assign=True)
        self.unet.requires_grad_(False)
        self._blocks = [
            module for module in self.unet.modules() if isinstance(module, ResBlock | BasicTransformerBlock)
        ]
        for block in self._blocks:  # what it computes is not kept for gradients, but computed once more
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        self.device = koala.load_device
        self._patcher = comfy.model_patcher.ModelPatcher(
            self.unet, self.device, comfy.model_management.unet_offload_device()
        )
        comfy.model_management.load_models_gpu([self._patcher], memory_required=1e20, force_full_load=True)
        self.unet.to(self.device)  # with --novram the host leaves the weights where they are all the same

    def close(self) -> None:
        """Let its memory go as soon as nobody has it: each block refers to itself until then."""
        for block in self._blocks:
            del block.forward

    def conditions(self, texts: Sequence[Conditioning], samples: Samples) -> list[Conditions]:
        """What the U-Net gets of each text, by the names of ``CONDITIONS``, as in sampling."""
        found = []
        for text in texts:
            entry = comfy.sampler_helpers.convert_cond(text[:1])
            (made,) = comfy.samplers.encode_model_conds(
                self._conditions, entry, samples.noisy[:1], torch.device("cpu"), "positive"
            )
            found.append({name: made["model_conds"][name] for name in CONDITIONS})
        return found

    def output(self, samples: Samples, conditions: Sequence[Conditions]) -> Tensor:
        """The noise that is predicted in samples, [n, 4, h, w], times the square root of the weight that its squared
        error has: as velocity's, at most ``MOST_WEIGHT``."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma, noisy = samples.sigma.to(self.device), samples.noisy.to(self.device)
        given = [conditions[row] for row in samples.text.tolist()]
        context, pooled = (  # copies, as those that were made in inference mode cannot be kept for gradients
            given[0][name].concat([one[name] for one in given[1:]]).to(self.device, torch.float32, copy=True)
            for name in CONDITIONS
        )
        found: Tensor = self.unet(
            self._sampling.calculate_input(sigma, noisy),
            self._sampling.timestep(sigma).float(),
            context=context,
            y=pooled,
            transformer_options={"optimized_attention_override": _differentiable},
        )
        return found * weights(samples.sigma).to(self.device)


def weights(sigma: Tensor) -> Tensor:
    """The square root of the weight of a sample's squared error, by its noise level [n]; [n, 1, 1, 1]."""
    return (1 + sigma.square()).clamp(max=MOST_WEIGHT).sqrt().view(-1, 1, 1, 1)


def _differentiable(_chosen: Any, *arguments: Any, **options: Any) -> Tensor:
    """PyTorch's attention in the place of the host's choice, which need not have gradients."""
    found: Tensor = attention_pytorch(*arguments, **options)
    return found
