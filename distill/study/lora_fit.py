"""Does a LoRA fitted by least squares show more on a koala-tiny than one carried over by lineage? Fits and counts.

Usage: python -m tools.run koala_sdxl.distill.study.lora_fit --teacher DIR --student FILE --lora FILE --work DIR
                                   [--size PIXELS] [--seeds N] [--out JSON]

The LoRA is the one for cyan that addons.py trains. The fit sees noisy latents that the teacher and the student meet
while they sample; none of its prompts is judged. The fitted LoRA is an ordinary file for KOALA, in the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tools.measure.bench import meter
from tools.tiny import denoiser, pipeline
from tools.tiny.judge import judge
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, TEMPLATES, caption

from ...koala.architecture.layout import KOALA_TINY
from ...koala.architecture.lineage import lineage
from ...koala.files.atomic_write import write_safetensors, written_whole
from .. import single_file
from .addon_pictures import judge_cyan, saying_cyan
from .fit import Changes, Fitted, fit_changes, low_rank

SAMPLES, ITERATIONS, RANK = 256, 25, 8
PROMPTS = 24  # sampled for the fit by each network, a third of them without the LoRA's word
WITHOUT_PROMPT = 0.2  # share of the samples that see zeros, as the negative prompt does
CHUNK = 32  # samples in one forward pass
STRENGTHS = (1.0, 1.5, 2.0, 3.0)

Sample = dict[str, Tensor]
"""Of n noisy latents: sample [n, 4, h, w], timestep [n], encoder_hidden_states [n, 77, 96], text_embeds [n, 64] and
time_ids [n, 6]."""
Field = tuple[int, int, int]
"""A prompt's shape, colour and background."""


@dataclass(frozen=True)
class Row:
    """Percentages of images: of n prompts with the LoRA's word those with a cyan shape, the correct background, the
    correct shape, and all three; of n_plain prompts without it those with the prompt's shape and colours."""

    row: str
    seed: int
    n: int
    n_plain: int
    cyan: float
    background: float
    shape: float
    all: float
    plain: float


def fields(held_out: bool) -> list[Field]:
    """The prompts' contents: a third for fitting, the others to be judged."""
    shapes, colours = range(len(SHAPE_NAMES)), range(len(COLOUR_NAMES))
    every = [(shape, colour, back) for back in colours for shape in shapes for colour in colours if colour != back]
    return [field for field in every if ((field[0] + field[2]) % 3 != 0) == held_out]


def said(field: Field, cyan: bool) -> str:
    """The prompt of a field."""
    shape, colour, background = field
    plain = caption(TEMPLATES[0][1], shape=shape, colour=colour, background=background).text
    return saying_cyan(plain, colour) if cyan else plain


def some(held_out: bool, n: int, generator: torch.Generator) -> list[Field]:
    """n different fields."""
    every = fields(held_out)
    return [every[index] for index in torch.randperm(len(every), generator=generator)[:n].tolist()]


def read_changes(path: Path, unet: UNet2DConditionModel) -> Changes:
    """What a LoRA file with kohya's names adds to a U-Net's weights: name of a weight -> change."""
    file = load_file(path)
    found = {}
    for name, module in unet.named_modules():
        key = "lora_unet_" + name.replace(".", "_")
        if isinstance(module, torch.nn.Linear) and f"{key}.lora_up.weight" in file:
            up, down = (file[f"{key}.lora_{side}.weight"].float() for side in ("up", "down"))
            found[f"{name}.weight"] = float(file.get(f"{key}.alpha", torch.tensor(len(down)))) / len(down) * up @ down
    return found


def write_changes(changes: Mapping[str, Tensor], rank: int, path: Path) -> None:
    """Write changes as a LoRA file with kohya's names."""
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up, down = low_rank(change, min(rank, *change.shape))
        tensors |= {f"{key}.lora_up.weight": up.half(), f"{key}.lora_down.weight": down.half()}
        tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, replace=True) as aside:
        write_safetensors(aside, tensors, {"ss_base_model_version": "koala"})


@contextmanager
def changed(unet: UNet2DConditionModel, changes: Mapping[str, Tensor]) -> Iterator[UNet2DConditionModel]:
    """A U-Net with changes added to its weights, which are as before afterwards."""
    before = {name: unet.get_parameter(name).detach().clone() for name in changes}
    with torch.no_grad():
        for name, change in changes.items():
            unet.get_parameter(name).add_(change)
    try:
        yield unet
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                unet.get_parameter(name).copy_(weight)


def joined(samples: list[Sample]) -> Sample:
    """Samples after one another."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def visited(model: StableDiffusionXLPipeline, size: int, prompts: list[str], seed: int) -> Sample:
    """What a pipeline's U-Net sees while it samples, at every step, without the half that sees the negative prompt."""
    seen: list[Sample] = []

    def record(_: Any, given: tuple[Any, ...], further: dict[str, Any]) -> None:
        count = len(given[0]) // 2
        conditions = further["added_cond_kwargs"]
        inputs = {
            "sample": given[0],
            "timestep": torch.as_tensor(given[1]).long().expand(2 * count),
            "encoder_hidden_states": further["encoder_hidden_states"],
            "text_embeds": conditions["text_embeds"],
            "time_ids": conditions["time_ids"],
        }
        seen.append({name: tensor[count:].clone() for name, tensor in inputs.items()})

    hook = model.unet.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pipeline.pictures(model, prompts, seed=seed, size=size)
    finally:
        hook.remove()
    return joined(seen)


def predicted(unet: UNet2DConditionModel, given: Sample, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """A U-Net's output, with other weights where given, times the square root of its weight in the velocity's error."""
    signal = DDPMScheduler(**denoiser.NOISE).alphas_cumprod
    weight = (1 / signal).clamp(max=denoiser.Recipe.most_weight)

    def run(part: Tensor) -> Tensor:
        one = {name: tensor[part] for name, tensor in given.items()}
        conditions = {name: one.pop(name) for name in ("text_embeds", "time_ids")}
        inputs = {**one, "added_cond_kwargs": conditions}
        output: Tensor = functional_call(unet, dict(weights or {}), (), inputs).sample
        return output * (weight / weight.mean())[one["timestep"]].sqrt().view(-1, 1, 1, 1)

    parts = torch.arange(len(given["timestep"])).split(CHUNK)
    # The backward pass computes one part at a time anew, so that it holds the activations of no other.
    return torch.cat([checkpoint(run, part, use_reentrant=False) for part in parts])


def samples(
    model: StableDiffusionXLPipeline, nets: list[tuple[UNet2DConditionModel, Changes]], size: int, seed: int
) -> Sample:
    """SAMPLES of what several U-Nets, each with its LoRA, meet while they sample prompts for fitting."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for number, (unet, changes) in enumerate(nets):
        prompts = [said(field, at % 3 != 0) for at, field in enumerate(some(False, PROMPTS, generator))]
        with changed(unet, changes) as model.unet:
            seen.append(visited(model, size, prompts, 10**6 * (seed + 1) + 1000 * number))
    every = joined(seen)
    chosen = torch.randperm(len(every["timestep"]), generator=generator)[:SAMPLES]
    found = {name: tensor[chosen] for name, tensor in every.items()}
    without = torch.rand(len(chosen), generator=generator) < WITHOUT_PROMPT
    found["encoder_hidden_states"][without] = 0
    found["text_embeds"][without] = 0
    return found


def fit(teacher: UNet2DConditionModel, lora: Changes, student: UNet2DConditionModel, given: Sample) -> Fitted:
    """The student's changes with which its output changes as the teacher's does by its LoRA, from the lineage's."""
    with torch.no_grad():
        own, whole = predicted(student, given), predicted(teacher, given)
        with changed(teacher, lora):
            wanted = own + predicted(teacher, given) - whole

    def output(changes: Mapping[str, Tensor]) -> Tensor:
        return predicted(student, given, {name: student.get_parameter(name) + part for name, part in changes.items()})

    return fit_changes(output, carried(lora), wanted, ITERATIONS)


def carried(lora: Changes) -> Changes:
    """The changes of a koala-tiny by lineage: each weight's is that of the teacher's weight that it came from."""
    origins = {part.diffusers: whole.diffusers for part, whole in lineage(KOALA_TINY).tensors}
    return {part: lora[whole] for part, whole in origins.items() if whole in lora}


def judged(name: str, model: StableDiffusionXLPipeline, size: int, seed: int, n: int = 96, n_plain: int = 54) -> Row:
    """Sample and judge held-out prompts with and without the LoRA's word."""
    generator = torch.Generator().manual_seed(seed)
    asked, plain = some(True, n, generator), some(True, n_plain, generator)
    made = judge_cyan(
        pipeline.pictures(model, [said(field, True) for field in asked], seed=10**5 * (seed + 1), size=size)
    )
    shape, _, background = torch.tensor(asked).T
    right, same = made.shape == shape, made.background == background
    others = judge(
        pipeline.pictures(model, [said(field, False) for field in plain], seed=10**5 * (seed + 2), size=size)
    )
    shape, colour, background = torch.tensor(plain).T
    kept = (others.shape == shape) & (others.colour == colour) & (others.background == background)
    shares = (_percent(values) for values in (made.cyan, same, right, made.cyan & same & right, kept))
    return Row(name, seed, n, n_plain, *shares)


def _percent(values: Tensor) -> float:
    return 100 * float(values.float().mean())


def evaluate(teacher: Path, student: Path, lora: Path, work: Path, size: int, seeds: int) -> dict[str, Any]:
    """Fit and judge, once for each seed; returns the figures for JSON."""
    model = pipeline.load(teacher)
    whole, part = model.unet, single_file.pipeline(student, teacher / "tokenizer").unet
    for unet in (whole, part):
        unet.requires_grad_(False)
    changes = read_changes(lora, whole)
    rows, fits = [], []
    for seed in range(seeds):
        with torch.no_grad():
            given = samples(model, [(whole, changes), (part, carried(changes))], size, seed)
        started = time.monotonic()
        fitted = fit(whole, changes, part, given)
        fits.append({"seed": seed, "s": time.monotonic() - started, "before": fitted.before, "after": fitted.after})
        path = work / f"{lora.stem}-fitted-{seed}.safetensors"
        write_changes(fitted.changes, RANK, path)
        nets: dict[str, tuple[UNet2DConditionModel, Changes]] = {
            "teacher + LoRA": (whole, changes),
            "student": (part, {}),
            **{
                f"student + LoRA, lineage, strength {k}": (part, {n: k * c for n, c in carried(changes).items()})
                for k in STRENGTHS
            },
            f"student + LoRA, fitted, rank {RANK}": (part, read_changes(path, part)),
        }
        for name, (unet, its) in nets.items():
            with torch.no_grad(), changed(unet, its) as model.unet:
                rows.append(judged(name, model, size, seed))
            print(rows[-1], flush=True)
    settings = {"samples": SAMPLES, "iterations": ITERATIONS, "rank": RANK, "size": size}
    return {"settings": settings, "fits": fits, "rows": [asdict(row) for row in rows], "computer": meter.computer()}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lora-fit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="sdxl-tiny's diffusers folder")
    parser.add_argument("--student", type=Path, required=True, help="a koala-tiny's checkpoint file")
    parser.add_argument("--lora", type=Path, required=True, help="a LoRA for cyan, trained on the teacher")
    parser.add_argument("--work", type=Path, required=True, help="folder of the fitted LoRAs")
    parser.add_argument("--size", type=int, choices=(64, 128), default=128, help="side of the images in pixels")
    parser.add_argument("--seeds", type=int, default=3, help="how many times prompts and noise are drawn")
    parser.add_argument("--out", type=Path, help="JSON file for the figures, which are printed as well")
    given = parser.parse_args(argv)
    found = evaluate(given.teacher, given.student, given.lora, given.work, given.size, given.seeds)
    figures = json.dumps(found, indent=2)
    print(figures)
    if given.out:
        given.out.write_text(figures + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
