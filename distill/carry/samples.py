"""What is learned from: noisy latents that both networks meet while they sample, and what SDXL's LoRA does there.

No images are needed. SDXL's outputs are computed once, with the LoRA and without it, and kept, so that SDXL and the
KOALA are never in memory at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from ...koala.lora.learning import WITHOUT_PROMPT, rows_to_draw
from ..teacher import Encoder
from .settings import HELD_OUT, Settings

State = dict[str, Tensor]
STUDENT, TEACHER = 0, 1
"""The networks that sample."""
Acts = Callable[[Tensor], AbstractContextManager[object]]
"""Makes a ControlNet act on a U-Net's forward passes, each sample with the control image of this number [n]."""
LORA, FILE = "lora ", "file "
"""What the names of embeddings with the LoRA, and those of tensors for the file, begin with."""


class Samples(NamedTuple):
    """n noisy latents: as the U-Net sees them [n, 4, h, w], time step [n], row of the texts [n], whether they see a
    prompt to keep, bool [n], and number of the control image [n], 0 without any."""

    noisy: Tensor
    time: Tensor
    text: Tensor
    kept: Tensor
    hint: Tensor

    def pick(self, part: Tensor) -> Samples:
        """Some of them, by their numbers."""
        return Samples(*(tensor[part] for tensor in self))


@dataclass(frozen=True)
class Texts:
    """Embeddings of every prompt, and in the last row zeros: context [p + 1, 77, c] and pooled [p + 1, d], without the
    LoRA and with its text encoders."""

    plain: tuple[Tensor, Tensor]
    with_lora: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, state: State) -> Texts:
        """From ``encoded``."""
        plain, with_lora = ((state[f"{one}context"], state[f"{one}pooled"]) for one in ("", LORA))
        return cls(plain, with_lora)

    @property
    def empty(self) -> int:
        """The row of the empty prompt, which is zeros in SDXL and KOALA."""
        return len(self.plain[0]) - 1


def alone(_: Tensor) -> AbstractContextManager[object]:
    """No ControlNet acts."""
    return nullcontext()


def encoded(
    pipeline: Any, change: Any, prompts: list[str], device: torch.device, batch: int, say: Callable[[str], None]
) -> State:
    """The embeddings of prompts, by the text encoders of diffusers' pipeline without a change and with it; and the
    tensors of the change's text part, for the file. ``say`` receives what there is to tell of these."""

    def texts() -> tuple[Tensor, ...]:
        encoder = Encoder(pipeline, device)
        parts = [encoder.texts(prompts[first : first + batch]) for first in range(0, len(prompts), batch)]
        return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    names, state = ("context", "pooled"), State()
    plain = texts()
    text, said = change.texts(pipeline)
    if said:
        say(said)
    with_lora = texts() if text else plain
    for prefix, pair in (("", plain), (LORA, with_lora)):
        state |= {prefix + name: _with_zeros(one) for name, one in zip(names, pair, strict=True)}
    return state | {FILE + name: tensor.contiguous() for name, tensor in text.items()}


def _with_zeros(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.zeros_like(rows[:1])])


def drawn(given: Settings, prompts: int, keep: int) -> tuple[list[int], list[int]]:
    """The rows of the prompts that each network samples to learn from, and those held out; of ``prompts`` prompts, with
    ``keep`` behind them that are to be kept."""
    return rows_to_draw(prompts, keep, HELD_OUT, given.samples, given.held_out, given.per_prompt)


def visited(
    unet: UNet2DConditionModel,
    scheduler: EulerDiscreteScheduler,
    texts: tuple[Tensor, Tensor],
    rows: list[int],
    hints: list[int],
    used: int,
    given: Settings,
    draw: int,
    acts: Acts = alone,
) -> Samples:
    """What a U-Net sees at each step while it samples prompts, without the half that with guidance sees the negative
    prompt; on the CPU in fp32.

    Args:
        unet: the U-Net.
        scheduler: that of its pipeline, with the spacing.
        texts: context and pooled.
        rows: of the prompts in ``texts``; a row may come several times.
        hints: the number of the control image of each.
        used: how many prompts use the LoRA; those to keep are behind them.
        given: size, steps, cfg, batch and seed.
        draw: a number that tells this initial noise from that of other calls.
        acts: a ControlNet on this U-Net.
    """
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_: Any, positional: tuple[Any, ...]) -> None:
        noisy = positional[0][-len(some) :]  # with guidance the negative prompt's are before them
        seen.append((noisy.float().cpu(), torch.as_tensor(positional[1]).long().cpu()))

    found: list[Samples] = []
    for first in range(0, len(rows), given.batch):
        some, shown = (torch.tensor(numbers[first : first + given.batch]) for numbers in (rows, hints))
        context, pooled = (one[some].to(unet.device, unet.dtype) for one in texts)
        seed = (given.seed + 1) * 1_000_000 + draw * 10_000 + first
        hook = unet.register_forward_pre_hook(record)
        try:
            with torch.no_grad(), acts(shown):
                pipeline(
                    prompt_embeds=context,
                    pooled_prompt_embeds=pooled,
                    negative_prompt_embeds=torch.zeros_like(context),
                    negative_pooled_prompt_embeds=torch.zeros_like(pooled),
                    height=given.size,
                    width=given.size,
                    num_inference_steps=given.draw_steps,
                    guidance_scale=given.cfg,
                    generator=[torch.Generator().manual_seed(seed + at) for at in range(len(some))],
                    output_type="latent",
                )
        finally:
            hook.remove()
        found += [Samples(noisy, time.expand(len(noisy)), some, some >= used, shown) for noisy, time in seen]
        seen.clear()
    return joined(found)


def joined(parts: list[Samples]) -> Samples:
    """Samples after one another."""
    return Samples(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def chosen(of: Samples, count: int, empty: int | None, generator: torch.Generator) -> Samples:
    """Some samples, at random; a few of them see the empty prompt, which is the row ``empty``, if there is one.

    The empty prompt is not kept, whosever way it is on: a noisy latent hardly tells that, and with guidance SDXL turns
    away from what its LoRA makes of the empty prompt.
    """
    some = of.pick(torch.randperm(len(of.time), generator=generator)[:count])
    if empty is None:
        return some
    without = torch.rand(len(some.time), generator=generator) < WITHOUT_PROMPT
    return some._replace(text=torch.where(without, empty, some.text), kept=some.kept & ~without)


def outputs(unet: Any, samples: Samples, texts: tuple[Tensor, Tensor], given: Settings, acts: Acts = alone) -> Tensor:
    """A U-Net's outputs, [n, 4, h, w], fp32 on the CPU; in batches."""
    parts = torch.arange(len(samples.time)).split(given.batch)
    with torch.no_grad():
        return torch.cat([output(unet, samples.pick(part), texts, given, acts).float().cpu() for part in parts])


def output(unet: Any, samples: Samples, texts: tuple[Tensor, Tensor], given: Settings, acts: Acts = alone) -> Tensor:
    """A U-Net's outputs in one forward pass, in its own type and on its own device."""
    device, dtype = unet.device, unet.dtype
    context, pooled = (one[samples.text].to(device, dtype) for one in texts)
    sizes = torch.tensor([[given.size, given.size, 0, 0, given.size, given.size]], device=device)
    added = {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), 6)}
    noisy, time = samples.noisy.to(device, dtype), samples.time.to(device)
    with acts(samples.hint):
        found: Tensor = unet(noisy, time, encoder_hidden_states=context, added_cond_kwargs=added).sample
    return found


def wanted(own: Tensor, change: Tensor, kept: Tensor) -> Tensor:
    """The outputs that are asked of the KOALA, [n, 4, h, w]: its own without a LoRA, changed as SDXL's LoRA changes
    SDXL's; unchanged for prompts to keep.

    Args:
        own: its outputs without a LoRA.
        change: what SDXL's LoRA adds to SDXL's.
        kept: whether a sample sees a prompt to keep, bool [n].
    """
    return own + torch.where(kept.view(-1, 1, 1, 1), 0.0, change)


def as_samples(state: Mapping[str, Tensor]) -> Samples:
    """Samples that were stored, by the names of their fields."""
    return Samples(*(state[field] for field in Samples._fields))
