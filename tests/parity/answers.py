"""What a model answers, to be compared with what another answers."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import torch

from koala_sdxl.host.model import model_facts


def predict(model: Any) -> torch.Tensor:
    """One prediction of the U-Net, patches applied, as sampling would call it; (1, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(5)
    shape = model_facts(model).layout
    shapes = [(1, 4, 8, 8), (1, 77, shape.context), (1, shape.pooled)]
    x, context, pooled = (torch.randn(size, generator=generator) for size in shapes)
    conditioning = [[context, {"pooled_output": pooled}]]
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = torch.tensor([5.0, 0.0])
    return comfy.sample.sample_custom(model, x, 1.0, sampler, sigmas, conditioning, conditioning, torch.zeros_like(x))


def encode(clip: Any) -> list[torch.Tensor]:
    """A text's conditioning: (1, 77, width), and pooled."""
    text, rest = clip.encode_from_tokens_scheduled(clip.tokenize("a red star"))[0]
    return [text, rest["pooled_output"]]
