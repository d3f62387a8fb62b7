"""Rounding in what an SDXL LoRA changes: the figures that reports and docs go by, measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_sdxl.distill.carry import source
from koala_sdxl.distill.carry.rounding import ROUNDING, rounding
from koala_sdxl.distill.carry.samples import Samples, outputs
from koala_sdxl.distill.carry.settings import Settings
from tests.daily import daily
from tests.dev import carry_runs
from tests.dev.carry_runs import settings, texts

place = pytest.fixture(scope="module")(carry_runs.place)
PROMPTS, COUNT = 3, 5


def measured(given: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """What the LoRA changes in sdxl-tiny's outputs on random noisy latents, and the outputs without it."""
    generator = torch.Generator().manual_seed(0)
    samples = Samples(
        torch.randn(COUNT, 4, 8, 8, generator=generator),
        torch.arange(COUNT) * 200 + 100,
        torch.arange(COUNT) % PROMPTS,
        torch.zeros(COUNT).bool(),
        torch.zeros(COUNT).long(),
    )
    opened, words = source.open_source(given), texts(PROMPTS)
    unet = opened.teacher.unet()
    with opened.change.on_teacher(unet, opened.teacher.file):
        with_lora = outputs(unet, samples, words.with_lora, given)
    plain = outputs(unet, samples, words.plain, given)
    return with_lora - plain, plain


@pytest.mark.parametrize("strength", daily([1.0, 0.1], [0.1]))
@pytest.mark.parametrize("dtype", daily(ROUNDING, ["fp16"]))
def test_rounding_is_what_the_report_goes_by(place: Path, dtype: str, strength: float) -> None:
    lora = {
        name: value * strength if "lora_up" in name else value
        for name, value in load_file(place / "lora.safetensors").items()
    }
    save_file(lora, place / "weak.safetensors")
    given = settings(place, "x", lora=place / "weak.safetensors")
    exact, plain = measured(given)
    found, _ = measured(settings(place, "x", lora=given.lora, dtype=dtype))
    share = float((found - exact).norm() / plain.norm())
    assert 0.5 < share / ROUNDING[dtype] < 2


@pytest.mark.parametrize(
    ("change", "dtype", "said"),
    [
        (
            0.1,
            "fp16",
            "by 5 % (root mean square); rounding in fp16 is about 2 % of that change, going by a small model",
        ),
        (
            0.1,
            "bf16",
            "by 5 % (root mean square); rounding in bf16 is about 14 % of that change, going by a small model; "
            "--dtype fp32 has next to none, and takes twice the memory for SDXL",
        ),
        (0.1, "fp32", "by 5 % (root mean square)"),
        (0.0, "fp16", "by 0 % (root mean square)"),
    ],
)
def test_the_report_says_how_much_of_the_change_is_rounding(change: float, dtype: str, said: str) -> None:
    found = rounding(torch.full((2, 4, 8, 8), change), torch.tensor(2.0), dtype)
    assert found == f"SDXL's output changes {said}"
