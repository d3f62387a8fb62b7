"""What is learned from: noisy latents that models meet while ComfyUI samples prompts with them, and their predictions.

Latents are as samplers have them: the clean one plus sigma times the noise. Predictions are of the clean latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...koala.lora.learning import PER_DRAWING, WITHOUT_PROMPT, rows_to_draw
from ...koala.schedule import Schedule
from ..prompt import zeros
from ..protocols import Clip, Conditioning, Model

DRAWS = 10_000
"""How far the seeds of the two networks' noise are apart."""
SEEDS = 2**64
"""ComfyUI's seeds are below this."""
PIXELS = 1024 * 1024
"""Of the images in one forward pass: so memory does not grow where images are small."""
Tick = Callable[[int], None]
"""Called before each pass with the number of its images: it moves the progress bar, or ends a cancelled run."""
HELD_OUT = 5
"""Of so many prompts one is held out, and so many of a network's samples: they measure."""


class Samples(NamedTuple):
    """n noisy latents [n, 4, h, w], their noise levels [n], and the rows of their texts [n]; fp32, on the CPU."""

    noisy: Tensor
    sigma: Tensor
    text: Tensor

    def pick(self, part: Tensor) -> Samples:
        """Some of them, by their numbers."""
        return Samples(*(tensor[part] for tensor in self))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The numbers of those that go through a network together."""
        pixels = 64 * self.noisy.shape[-1] * self.noisy.shape[-2]
        parts: tuple[Tensor, ...] = torch.arange(len(self.sigma)).split(max(1, PIXELS // pixels))
        return parts


def joined(parts: Iterable[Samples]) -> Samples:
    """Samples after one another."""
    return Samples(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled: noise levels, guidance, and size of the image in pixels."""

    schedule: Schedule
    cfg: float
    size: int

    @property
    def steps(self) -> int:
        return len(self.schedule.sigmas) - 1

    @property
    def guided(self) -> bool:
        """Whether each step also sees the empty prompt."""
        return self.cfg > 1


@dataclass(frozen=True)
class Plan:
    """What either network samples: ``prompts`` prompts that use the change, and ``keep`` behind them that are to stay
    as they are; ``samples`` samples in all.

    A fifth of them is held out: of other prompts.
    """

    sampling: Sampling
    prompts: int
    keep: int
    samples: int
    seed: int

    @property
    def held_out(self) -> int:
        """Samples of either network that are held out."""
        return self.samples // 2 // HELD_OUT

    @property
    def learned(self) -> int:
        """Samples of either network that are learned from."""
        return self.samples // 2 - self.held_out

    @property
    def each(self) -> int:
        """Samples of either network for each image."""
        return min(PER_DRAWING, self.sampling.steps)

    @property
    def drawings(self) -> int:
        """How many images either network draws."""
        return sum(len(rows) for rows, _ in self._groups())

    def kept(self, samples: Samples) -> Tensor:
        """Whether samples see a prompt to keep, bool [n]. The empty prompt is none: the network changes there as it
        does for the others, since with guidance images turn away from what it gives."""
        return (samples.text >= self.prompts) & (samples.text < self.prompts + self.keep)

    def met(self, model: Model, texts: list[Conditioning], network: int, tick: Tick) -> list[Samples]:
        """What a network meets while it samples: to learn from, and held out. ``network``: its number, 0 or 1."""
        found = []
        for group, (rows, count) in enumerate(self._groups()):
            seed = self.seed + DRAWS * (2 * network + group)
            seen = visited(model, texts, rows, self.sampling, seed, tick)
            generator = torch.Generator().manual_seed(seed % SEEDS)
            some = seen.pick(torch.randperm(len(seen.sigma), generator=generator)[:count])
            without = torch.rand(count, generator=generator) < (WITHOUT_PROMPT if self.sampling.guided else 0)
            found.append(some._replace(text=torch.where(without, len(texts) - 1, some.text)))
        return found

    def _groups(self) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
        """The prompts that are sampled, and the number of samples."""
        learned, measured = rows_to_draw(self.prompts, self.keep, HELD_OUT, self.learned, self.held_out, self.each)
        return (learned, self.learned), (measured, self.held_out)


def encoded(clip: Clip, prompts: Iterable[str]) -> list[Conditioning]:
    """The conditioning of each prompt, as ComfyUI reads it, and that of the empty one, which is zeros, behind them."""
    found = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]
    return [*found, zeros(found[0])]


def visited(
    model: Model, texts: list[Conditioning], rows: Iterable[int], sampling: Sampling, seed: int, tick: Tick
) -> Samples:
    """What a MODEL meets at each step while it samples prompts with Euler's method.

    Args:
        model: the MODEL.
        texts: as ``encoded`` gives them.
        rows: which of them; a row may come several times.
        sampling: schedule, cfg and size.
        seed: of the first prompt's noise; the others have the ones that follow.
        tick: called at each step.
    """
    sampler = comfy.samplers.sampler_object("euler")
    sampler.max_denoise = lambda *_: sampling.schedule.full_variance
    latent = torch.zeros(1, 4, sampling.size // 8, sampling.size // 8)
    found: list[Samples] = []
    met: list[tuple[Tensor, Tensor]] = []

    def met_at(step: int, denoised: Tensor, noisy: Tensor, steps: int) -> None:
        tick(1)
        met.append((noisy.float().cpu(), sampling.schedule.sigmas[step : step + 1]))

    for number, row in enumerate(rows):
        own = (seed + number) % SEEDS
        noise, sigmas = comfy.sample.prepare_noise(latent, own), sampling.schedule.sigmas
        given = (texts[row], texts[-1], latent)
        comfy.sample.sample_custom(
            model, noise, sampling.cfg, sampler, sigmas, *given, callback=met_at, disable_pbar=True, seed=own
        )
        found += [Samples(noisy, sigma, torch.tensor([row])) for noisy, sigma in met]
        met.clear()
    return joined(found)


def predictions(model: Model, texts: list[Conditioning], samples: Samples, tick: Tick) -> Tensor:
    """A MODEL's predictions of the clean latents, [n, 4, h, w], fp32, on the CPU; with all that is set on the MODEL, as
    when it is sampled at cfg 1."""
    found = torch.empty_like(samples.noisy)
    for row in samples.text.unique().tolist():
        rows = (samples.text == row).nonzero().flatten()
        some = samples.pick(rows)
        guider, passes = comfy.samplers.CFGGuider(model), _Passes(some, tick)
        guider.set_conds(texts[row], texts[-1])
        guider.set_cfg(1.0)
        empty = torch.zeros_like(some.noisy[some.parts[0]])
        guider.sample(empty, empty, passes, some.sigma, disable_pbar=True, seed=0)
        found[rows] = torch.cat(passes.found)
    return found


class _Passes:
    """A sampler of ComfyUI's that takes no steps: it asks the model for its predictions on samples."""

    def __init__(self, samples: Samples, tick: Tick) -> None:
        self.samples, self.tick = samples, tick
        self.found: list[Tensor] = []

    @torch.no_grad()
    def sample(self, model: Any, sigmas: Tensor, extra_args: dict[str, Any], *arguments: Any, **_: Any) -> Tensor:
        """ComfyUI calls it with the guider, and with the noise as the second of ``arguments``, which it returns."""
        for part in self.samples.parts:
            self.tick(len(part))
            some = self.samples.pick(part)
            found = model(some.noisy.to(sigmas.device), some.sigma.to(sigmas.device), **extra_args)
            self.found.append(found.float().cpu())
        noise: Tensor = arguments[1]
        return noise
