"""The whole way from what changed in an SDXL to a KOALA's LoRA: start by lineage, samples, least squares.

SDXL and KOALA are on the device one after the other. None of the models that are given is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...koala.architecture.keys import renaming
from ...koala.architecture.layout import Layout, name
from ...koala.architecture.lineage import Lineage
from ...koala.lora.adjustable import Adjustable, adjustable
from ...koala.lora.factors import factors, lora_tensors, rounded
from ...koala.lora.fit import Changes, fit_changes, fit_rounds, reached
from ...koala.lora.learning import ITERATIONS, ROUNDS
from ...koala.words import Message, lines, message
from ..model import described, model_facts, unet_layout
from ..protocols import Clip, Conditioning, Model
from ..transfer.guard import guarded
from .network import Conditions, Network, weights
from .samples import HELD_OUT, Plan, Samples, Sampling, Tick, encoded, joined, predictions
from .weights import Weights, differences, quantised_by

LEAST_PROMPTS = HELD_OUT
"""So that one is held out."""
USES = "as you use the LoRA"
STAYS = "that the LoRA is to leave as they are, or none"
"""Which prompts are expected, in words."""

Lora = dict[str, Tensor]
"""LORA_MODEL: a LoRA's tensors, as core's nodes apply and save them."""


class Learned(NamedTuple):
    """A LoRA, and in words how much of the wanted change it reaches."""

    lora: Lora
    report: Message


@dataclass(frozen=True)
class Models:
    """An SDXL, the same with changes, the KOALA that is to get them, and the text encoders of either SDXL."""

    sdxl: Model
    changed: Model
    koala: Model
    clip: Clip
    clip_changed: Clip | None = None
    """None: those of ``clip``."""

    def lineage(self) -> Lineage:
        """The KOALA's. Raises ValueError for a MODEL in the wrong place, and for one whose weights are quantised."""
        line = model_facts(self.koala).lineage
        line.require_transformers()
        whole = line.teacher
        for place, model in (("sdxl", self.sdxl), ("sdxl_changed", self.changed)):
            if unet_layout(model) != whole:
                raise ValueError(
                    f"{place} is {described(model)}; expected SDXL, with text of width {whole.context} and "
                    f"{whole.channels[0]} channels, of which {name(line.student)} has a part. Connect the MODEL of an "
                    f"SDXL checkpoint."
                )
        for place, model in (("sdxl", self.sdxl), ("sdxl_changed", self.changed), ("koala", self.koala)):
            if (scale := quantised_by(model)) is not None:
                raise ValueError(
                    f"{place} has quantised weights (with {scale}); expected plain ones, in fp16, bf16, fp32 or fp8 "
                    f"without scales. Load it from such a file."
                )
        return line


def learn(models: Models, prompts: str, keep: str, sampling: Sampling, rank: int, samples: int, seed: int) -> Learned:
    """A LoRA that changes a KOALA's output as the SDXL's is changed.

    Args:
        models: the models.
        prompts: one a line, as the change is used; empty lines do not count.
        keep: likewise, prompts that are to stay as they are; or nothing.
        sampling: how both networks are sampled.
        rank: of the LoRA.
        samples: noisy latents of both networks; one in ``HELD_OUT`` measures.
        seed: of all random numbers.

    Raises ValueError for MODELs in the wrong places, too few prompts or samples, two SDXLs that are equal in every
    layer that the KOALA has, and outputs that are not finite.
    """
    line, texts = models.lineage(), _prompts("prompts", prompts, USES)
    kept = _prompts("keep", keep, STAYS) if keep.strip() else []
    start = _start(models, line, rank)
    plan = Plan(sampling, len(texts), len(kept), samples, seed)
    if kept:
        _require_both(plan)
    passes = 2 + 1 + ROUNDS * (2 + 2 * ITERATIONS)  # about: of SDXL, of KOALA as it is, and of the least squares
    bar = comfy.utils.ProgressBar(2 * plan.drawings * sampling.steps + passes * 2 * (plan.learned + plan.held_out))

    def tick(images: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(images)

    texts += kept
    plain = encoded(models.clip, texts)
    changed = encoded(models.clip_changed, texts) if models.clip_changed is not None else plain
    seen, change = _samples(models, plan, lora_tensors(start, line.student), plain, changed, tick)
    with _fitting(models.koala, line.student, start, seen, change, 2 * plan.learned, (plain, changed), tick) as fit:
        numbers, before, after = fit.numbers(start)
    bar.update_absolute(bar.total)  # rounds of least squares that would not help were left out
    lora = lora_tensors(numbers, line.student)
    return Learned(lora, _report(lora, before, after, 2 * plan.held_out))


def _prompts(place: str, text: str, expected: str) -> list[str]:
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if len(found) < LEAST_PROMPTS:
        rows = "line" if len(found) == 1 else "lines"
        raise ValueError(
            f"{place} has {len(found)} {rows} with text; expected at least {LEAST_PROMPTS} prompts, one a line, "
            f"{expected}. Add some: every {HELD_OUT}th is held out, to measure."
        )
    return found


def _require_both(plan: Plan) -> None:
    """Raise ValueError where no image of a prompt to keep is held out."""
    if plan.held_out <= plan.each:
        raise ValueError(
            f"samples is {plan.samples}; expected at least {2 * HELD_OUT * (plan.each + 1)} with prompts in keep, so "
            f"that some of those are held out, too. Raise it, or empty keep."
        )


def _start(models: Models, line: Lineage, rank: int) -> Changes:
    """The LoRA by lineage."""
    found = factors(differences(Weights(models.sdxl), Weights(models.changed), line), rank)
    if not found:
        raise ValueError(
            f"sdxl_changed has the weights of sdxl in every layer that {name(line.student)} has; expected the same "
            f"SDXL with a LoRA, or fine-tuned. Connect the MODEL behind the LoRA to sdxl_changed, and the one before "
            f"it to sdxl."
        )
    return found


def _samples(
    models: Models, plan: Plan, start: Lora, plain: list[Conditioning], changed: list[Conditioning], tick: Tick
) -> tuple[Samples, Tensor]:
    """The samples, those held out last, and what the SDXL's change adds to the noise that it predicts in them: nothing
    for prompts to keep.

    The KOALA meets its half with ``start``.
    """
    koala, _ = comfy.sd.load_lora_for_models(guarded(models.koala), None, start, 1.0, 0.0)
    halves = plan.met(koala, changed, 0, tick), plan.met(models.changed, changed, 1, tick)
    every = joined([half for group in zip(*halves, strict=True) for half in group])
    with_change = predictions(models.changed, changed, every, tick)
    change = (predictions(models.sdxl, plain, every, tick) - with_change) / every.sigma.view(-1, 1, 1, 1)
    if not (change.isfinite().all() and change.any()):
        what = "the same" if change.isfinite().all() else "not finite"
        raise ValueError(
            f"the outputs of sdxl and sdxl_changed are {what}; expected numbers that differ. Take another type for "
            f"their weights, such as bf16, or another strength of the LoRA."
        )
    change[plan.kept(every)] = 0
    return every, change


@dataclass(frozen=True)
class _Fit:
    """A KOALA with places for a LoRA's numbers, and what its outputs are to become on the samples."""

    network: Network
    places: Adjustable
    conditions: list[Conditions]
    samples: Samples
    learned: int
    wanted: Tensor
    change: Tensor
    tick: Tick

    def numbers(self, start: Changes) -> tuple[Changes, float, float]:
        """The LoRA's numbers after the rounds of least squares, and the shares before and after. Raises ValueError
        where an output is not finite."""
        samples, wanted = self.samples.pick(torch.arange(self.learned)), self.wanted[: self.learned]
        output = self._output(samples)

        def slopes(at: Changes, error: Tensor) -> Changes:
            return self.places.slopes(at, output, lambda _, part: error[part], samples.parts)

        def fit(start: Changes) -> Changes:
            return fit_changes(
                lambda at: self.places.outputs(dict(at), output, samples.parts), start, wanted, ITERATIONS, slopes
            ).changes

        return fit_rounds(start, fit, lambda found: self.share(rounded(found)), ROUNDS)

    def share(self, numbers: Changes) -> float:
        """``reached`` on the samples held out."""
        samples = self.samples.pick(torch.arange(self.learned, len(self.wanted)))
        found = self.places.outputs(numbers, self._output(samples), samples.parts)
        return reached(self.wanted[self.learned :], found, self.change[self.learned :])

    def _output(self, samples: Samples) -> Callable[[Tensor], Tensor]:
        def output(part: Tensor) -> Tensor:
            self.tick(len(part))
            return self.network.output(samples.pick(part), self.conditions)

        return output


@contextmanager
def _fitting(
    koala: Model,
    layout: Layout,
    start: Changes,
    samples: Samples,
    change: Tensor,
    learned: int,
    texts: tuple[list[Conditioning], list[Conditioning]],
    tick: Tick,
) -> Iterator[_Fit]:
    """The KOALA on the device, outside inference mode, whose tensors have no gradients; ``texts``: without the change
    and with it."""
    # least squares look at differences of a hundredth of a change, which TF32 would round away
    cudnn = torch.backends.cudnn
    with torch.inference_mode(False), cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        network = Network(koala)
        try:
            plain, changed = (network.conditions(one, samples) for one in texts)
            own = []
            for part in samples.parts:
                tick(len(part))
                with torch.no_grad():
                    own.append(network.output(samples.pick(part), plain).cpu())
            asked = change.clone() * weights(samples.sigma)
            places = adjustable(network.unet, start, renaming(layout, "diffusers", "comfy"))
            yield _Fit(network, places, changed, samples, learned, torch.cat(own) + asked, asked, tick)
        finally:
            network.close()


def _report(lora: Lora, before: float, after: float, held_out: int) -> Message:
    layers = len({key.partition(".")[0] for key in lora})
    size = sum(tensor.nbytes for tensor in lora.values())
    return lines(
        message(
            "reached on {count} held-out samples: {share} of the wanted change, {lineage} by lineage alone",
            count=held_out,
            share=_percent(max(before, after)),
            lineage=_percent(before),
        ),
        *(() if after > before else (message("the least squares are no better: this is the LoRA by lineage"),)),
        message("LoRA: {layers} layers, {size} MB", layers=layers, size=f"{size / 1e6:.1f}"),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
