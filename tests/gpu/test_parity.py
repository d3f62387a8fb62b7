"""koala-tiny on a GPU against diffusers on the CPU, from the same text embeddings and the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koala_sdxl.host.accelerate.plan import PRESETS
from koala_sdxl.koala.architecture.components import LATENT_SCALE
from koala_sdxl.nodes.sample import KoalaSampler
from koala_sdxl.nodes.speed import KoalaAccelerate
from tests.speed.execution_cases import in_type
from tests.speed.sampling import pictures
from tools.measure import parity
from tools.measure.bench.image_quality import psnr

CASE = parity.TINY_CASES[0]
LARGEST, NEAREST = 1e-3, 38.0  # of a latent's values in fp32; decibels of an image in fp16


def conditioning() -> tuple[Any, Any]:
    """diffusers' own, in fp32."""
    pipe = parity.tiny_pipeline()
    encoded = pipe.encode_prompt(parity.PROMPT, negative_prompt=parity.NEGATIVE, device="cpu")
    text, negative, pooled, negative_pooled = encoded
    return [[text, {"pooled_output": pooled}]], [[negative, {"pooled_output": negative_pooled}]]


def drawn(model: Any) -> torch.Tensor:
    """The case's latents, as diffusers scales them."""
    preset = {"preset": "custom", "steps": CASE.steps, "cfg": CASE.cfg, "spacing": CASE.spacing}
    latent = {"samples": torch.zeros(CASE.batch, 4, CASE.height // 8, CASE.width // 8)}
    made = KoalaSampler.execute(model, *conditioning(), latent, CASE.seed, preset, "euler", 1.0)
    return made.result[0]["samples"].cpu() * LATENT_SCALE


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "exact"])
def test_fp32_is_diffusers(accelerated: bool) -> None:
    model = in_type(parity.tiny_models()[0], torch.float32)
    if accelerated:
        model = KoalaAccelerate.execute(model, {"preset": "exact"}).result[0]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = drawn(model)
    assert float((found - parity.reference_latents(CASE)).abs().max()) <= LARGEST


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_fp16_is_near_diffusers(preset: str | None) -> None:
    model = in_type(parity.tiny_models()[0], torch.float16)
    if preset is not None:
        model = KoalaAccelerate.execute(model, {"preset": preset}).result[0]
    bound = NEAREST if preset in (None, "exact") else 30.0  # the others skip steps
    assert psnr(pictures(drawn(model) / LATENT_SCALE), pictures(parity.reference_latents(CASE) / LATENT_SCALE)) >= bound
