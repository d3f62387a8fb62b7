"""koala-tiny's pictures, plain and accelerated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from koala_sdxl.host.accelerate import cpu_convolutions, cpu_vae, cpu_winograd
from koala_sdxl.host.accelerate.patch import accelerate
from koala_sdxl.host.accelerate.plan import OFF, REUSE, Acceleration, Reuse, Table
from koala_sdxl.koala.schedule import schedule
from koala_sdxl.nodes.prompt import KoalaPrompt
from koala_sdxl.nodes.sample import KoalaSampler
from tools.measure import parity
from tools.measure.bench.image_quality import prompts_of, psnr

BASE = {"preset": "custom", "steps": 25, "cfg": 7.5, "spacing": "leading"}
ALL_FULL = Acceleration(OFF, Reuse(*[Table(tuple(schedule(1000, "leading").sigmas[:-1].tolist()))] * 2))
"""Every step is a full step, by a table that lists every level."""
BALANCED = Acceleration(OFF, REUSE["balanced"])


class Said(list[str]):
    """What the node would tell the sampler's node after each run."""

    @property
    def full(self) -> int:
        """Passes of the last run through the full U-Net."""
        return int(self[-1].split(" of ")[0])

    @property
    def mean_full(self) -> float:
        """``full``, on average over all runs."""
        return sum(int(one.split(" of ")[0]) for one in self) / len(self)

    @property
    def passes(self) -> int:
        """All passes of the last run."""
        return int(self[-1].split()[2])


def said() -> Said:
    """A fixture's body: what is told in one test."""
    return Said()


def faster(said: Said) -> Callable[..., Any]:
    """A fixture's body: koala-tiny, or another MODEL, accelerated."""
    return lambda settings=BALANCED, model=None: (
        accelerate(parity.tiny_models()[0] if model is None else model, settings, said.append).model
    )


def by_winograd(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A fixture's body: what is asked of the probe, which finds Winograd's algorithm faster; every number of channels
    is enough."""
    if cpu_winograd.nnpack() is None:
        pytest.skip("this PyTorch is built without NNPACK, or the processor lacks what it needs")
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(cpu_convolutions, "MIN_CHANNELS", 1)
    monkeypatch.setattr(cpu_convolutions, "winograd_is_faster", noting(asked, True))
    monkeypatch.setattr(cpu_vae, "winograd_is_faster_for_large_images", lambda: True)
    return asked


def noting(calls: list[tuple[int, ...]], answer: Any) -> Callable[..., Any]:
    """A function that notes with what it is called, and answers so."""

    def note(*given: Any, **_: Any) -> Any:
        calls.append(given)
        return answer

    return note


def prompts(texts: Sequence[str] = ("a red circle on a white background",)) -> tuple[Any, ...]:
    """Conditioning that gives each picture of a batch a prompt of its own, and no negative prompt."""
    clip = parity.tiny_models()[1]
    made = [KoalaPrompt.execute(clip, text, "", "no style", "reference").result for text in texts]
    return tuple(
        [
            [
                torch.cat([one[side][0][0] for one in made]),
                made[0][side][0][1] | {"pooled_output": torch.cat([one[side][0][1]["pooled_output"] for one in made])},
            ]
        ]
        for side in (0, 1)
    )


def run(model: Any, texts: Any = None, **changes: Any) -> torch.Tensor:
    """The latents that KOALA Sampler makes, of 128 pixels; ``changes`` are to its inputs."""
    positive, negative = texts or prompts()
    latent = changes.pop("latent", None) or {"samples": torch.zeros(len(positive[0][0]), 4, 16, 16)}
    arguments: dict[str, Any] = {"seed": 5, "preset": BASE, "sampler_name": "euler", "denoise": 1.0} | changes
    return KoalaSampler.execute(model, positive, negative, latent, **arguments).result[0]["samples"]


def alone(model: Any, texts: tuple[Any, Any], **changes: Any) -> torch.Tensor:
    """``run`` for each picture of a batch by itself, from the same noise: a batch shares one decision."""
    found = []
    for row in range(len(texts[0][0][0])):
        latent = {"samples": torch.zeros(1, 4, 16, 16), "batch_index": [row]}
        found.append(run(model, [prompts_of(side, [row]) for side in texts], latent=latent, **changes))
    return torch.cat(found)


def plain(*arguments: Any, **named: Any) -> torch.Tensor:
    """``run`` with koala-tiny as it is."""
    return run(parity.tiny_models()[0], *arguments, **named)


def pictures(latents: torch.Tensor) -> torch.Tensor:
    """Latents decoded."""
    vae = parity.tiny_models()[2]
    return torch.cat([vae.decode(part) for part in latents.split(8)])


def decibels(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean PSNR of latents, once decoded."""
    return psnr(pictures(found), pictures(wanted))
