"""The whole way from an SDXL LoRA or ControlNet to a KOALA's: texts, samples, least squares, further training.

Each part is computed once and kept in the work folder; an interrupted run goes on there, and ends with the same file.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count as counted
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from ...koala.lora.fit import Changes, fit_rounds
from ...koala.lora.learning import ROUNDS
from ..errors import UserError
from ..single_file import tokenizers
from . import source as sources
from .job import Job
from .lengths import cut
from .memory import enough_memory
from .plan import plan
from .rounding import rounding
from .samples import (
    FILE,
    STUDENT,
    TEACHER,
    Acts,
    Samples,
    State,
    Texts,
    as_samples,
    chosen,
    drawn,
    encoded,
    joined,
    outputs,
    visited,
)
from .settings import Settings, origin, read_prompts, require_output
from .source import Source, open_source
from .work import Work

Say = Callable[[str], None]
PARTS = {
    "texts": "the text encoders encode the prompts",
    "student": "the KOALA samples the prompts, with the {} by lineage",
    "teacher": "SDXL samples the prompts with the {0}, and computes what the {0} changes",
    "fit": "least squares",
    "refit": "further training",
}
"""Of a run, in order, in words about a LoRA or ControlNet."""
MADE, MEASURED = "the KOALA computes its outputs as it is", "the KOALA is measured on the held-out samples"
"""Between the parts, and after them."""
LEAST_PROMPTS = 4
"""So that at least one is held out."""


@dataclass(frozen=True)
class Prompts:
    """Those that use the LoRA, and those that are to stay as they are, by the numbers of their lines."""

    used: dict[int, str]
    kept: dict[int, str]


def run(given: Settings, say: Say, also: Mapping[str, Path] | None = None) -> dict[str, float]:
    """Carry a LoRA or ControlNet over, or go on with that; returns how many seconds each part took.

    Args:
        given: the command line.
        say: receives the report, line by line.
        also: further files, by the way whose numbers they are to hold, for whoever compares the ways.

    Raises UserError, or CheckpointError, for everything that the person can put right.
    """
    require_output(given.out)
    prompts = Prompts(
        read_prompts(given.prompts, "--prompts", LEAST_PROMPTS),
        read_prompts(given.keep, "--keep", LEAST_PROMPTS) if given.keep else {},
    )
    source = open_source(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # least squares look at differences of a hundredth of a change
    for line in (*plan(given, source, device), *_cut(given, source, prompts)):
        say(line)
    if given.check:
        return {}
    change = source.change
    work = Work(given.work)
    work.make()
    say(f"files: their SHA-256, which the new {change.kind}'s metadata keep")
    said = origin(given, source.files, work.digest)
    if given.hints and change.hints:
        said["hints"] = {"name": given.hints.name, "sha256": change.hints.digest}
    work.open(said)
    seconds: dict[str, float] = {}

    def once(part: str, make: Callable[[], State], turn: int = 0) -> State:
        doing = PARTS[part].format(change.kind)
        if not turn:
            say(f"{part}: {doing}")
        with enough_memory(doing, given):
            found, took = work.once(f"{part} {turn + 1}" if turn else part, make)
        seconds[part] = seconds.get(part, 0.0) + took
        gc.collect()
        return found

    encodings = once("texts", lambda: _texts(given, source, prompts, device, say))
    texts = Texts.of(encodings)
    seen = once("student", lambda: _student_samples(given, source, prompts, texts, device))
    learned = once("teacher", lambda: _teacher_samples(given, source, prompts, texts, as_samples(seen), device))
    say(rounding(learned["change"], learned["size"], given.dtype))
    with enough_memory(MADE, given):
        job = Job.made(given, source, texts, learned, device)

    def share(numbers: Changes) -> float:
        with enough_memory(MEASURED, given):
            return job.share(change.rounded(numbers))

    turns = counted()
    found, by_lineage, fitted = fit_rounds(
        job.start, lambda at: once("fit", partial(job.fit, at), next(turns)), share, ROUNDS
    )
    ways, shares = {"lineage": job.start, "fit": found}, {"lineage": by_lineage, "fit": fitted}
    if given.method == "refit":
        ways["refit"] = once("refit", partial(job.refit, found, given.work / "checkpoint.pt"))
        shares["refit"] = share(ways["refit"])
    best = max(shares, key=lambda way: shares[way])
    text = {key.removeprefix(FILE): tensor for key, tensor in encodings.items() if key.startswith(FILE)}
    for way, path in ((best, given.out), *(also or {}).items()):
        reached_by = {"held_out": given.held_out, "shares": shares, "way": way}
        change.write(path, ways[way], text, said | reached_by, given)
    work.delete()
    say(reached(shares, given))
    if best != given.method:
        say(f"{given.method} is no better than {best} on the held-out samples: the file holds what {best} gives")
    say("seconds: " + ", ".join(f"{part} {took:.0f}" for part, took in seconds.items()))
    say(f"memory: at most {_peak():.1f} GB" + (f"; GPU {_gpu_peak():.1f} GB" if device.type == "cuda" else ""))
    say(f"{given.out}: {change.result(given)}, {given.out.stat().st_size / 1e6:.1f} MB")
    return seconds


def reached(shares: dict[str, float], given: Settings) -> str:
    """The shares in words."""
    each = ", ".join(f"{way} {100 * share:.1f} %" for way, share in shares.items())
    return f"share of the wanted change of the output that is reached, on {given.held_out} held-out samples: {each}"


def _cut(given: Settings, source: Source, prompts: Prompts) -> list[str]:
    tokenizer, _ = tokenizers(source.teacher.tokenizer)
    files = ((given.prompts, prompts.used), (given.keep, prompts.kept))
    return [line for path, found in files if path for line in cut(path, found, tokenizer)]


def _texts(given: Settings, source: Source, prompts: Prompts, device: torch.device, say: Say) -> State:
    words = [*prompts.used.values(), *prompts.kept.values()]
    return encoded(source.teacher.pipeline(), source.change, words, device, given.batch, say)


def _scheduler(source: Source, given: Settings) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler.from_config(source.teacher.noise.config, timestep_spacing=given.spacing)


def sampled(
    given: Settings,
    source: Source,
    prompts: Prompts,
    texts: Texts,
    unet: UNet2DConditionModel,
    acts: Acts,
    network: int,
) -> Samples:
    """Half of the samples, those of one network: to learn from, and behind them those held out."""
    groups = drawn(given, len(prompts.used), len(prompts.kept))
    counts, hints = (given.samples, given.held_out), source.change.hints
    shown = hints.turns if hints else tuple([0] * len(rows) for rows in groups)
    empty, found = texts.empty if given.guided else None, []
    scheduler = _scheduler(source, given)
    for number, (rows, images, count) in enumerate(zip(groups, shown, counts, strict=True)):
        draw = 2 * network + number
        seen = visited(unet, scheduler, texts.with_lora, rows, images, len(prompts.used), given, draw, acts)
        generator = torch.Generator().manual_seed(4 * given.seed + draw)
        own = count // 2 if network == STUDENT else count - count // 2
        found.append(chosen(seen, own, empty, generator))
    return joined(found)


def _student_samples(given: Settings, source: Source, prompts: Prompts, texts: Texts, device: torch.device) -> State:
    """What the KOALA meets with the LoRA or ControlNet as lineage carries it over."""
    unet = sources.student_unet(source).to(device)
    acts = source.change.on_student(unet, source.student)
    return sampled(given, source, prompts, texts, unet, acts, STUDENT)._asdict()


def _teacher_samples(
    given: Settings, source: Source, prompts: Prompts, texts: Texts, seen: Samples, device: torch.device
) -> State:
    """What SDXL meets with its LoRA or ControlNet, put together with ``seen``, and what that changes in its output
    there."""
    unet, half = source.teacher.unet().to(device), given.samples // 2
    with source.change.on_teacher(unet, source.teacher.file) as acts:
        own = sampled(given, source, prompts, texts, unet, acts, TEACHER)
        learned = seen.pick(torch.arange(half)), own.pick(torch.arange(given.samples - half))
        held_out = (
            seen.pick(torch.arange(half, len(seen.time))),
            own.pick(torch.arange(given.samples - half, len(own.time))),
        )
        every = joined([*learned, *held_out])
        with_lora = outputs(unet, every, texts.with_lora, given, acts)
    plain = outputs(unet, every, texts.plain, given)
    change = with_lora - plain
    if not change.isfinite().all():
        raise UserError(
            f"SDXL's output with {given.lora.name} is not finite in {given.dtype}; expected numbers. Take another "
            f"--dtype: bf16, or fp32."
        )
    return {**every._asdict(), "change": change, "size": plain.square().mean().sqrt()}


def _peak() -> float:
    """GB of memory that this process has had at most; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0.0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e9 if sys.platform == "darwin" else 1e6)


def _gpu_peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9
