"""The same weights in diffusers: what the pack's pictures are measured against.

Built from a ComfyUI-numbered checkpoint with diffusers' own converters for text encoders and autoencoder, so that the
judge shares no code with the pack but the U-Net's table of names, which the unit tests hold against diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koala_sdxl.distill import single_file
from koala_sdxl.distill.single_file import unet
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from tools.harness import testhost

__all__ = ["SCHEDULER_CONFIG", "pipeline", "unet"]


def pipeline(checkpoint: Path) -> Any:
    """diffusers' ``StableDiffusionXLPipeline`` with a single-file checkpoint's weights, fp32 on the CPU.

    CLIP's vocabulary is the test host's.
    """
    return single_file.pipeline(checkpoint, testhost.test_host().tokenizer)
