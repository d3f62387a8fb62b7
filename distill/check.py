"""What a run will do, before it does: its plan, the memory by part, and the seconds of a trial step.

The trial is one step of the run itself, on made-up latents: nothing is written, and the data need not be cached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DistributedType
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from ..koala.architecture.keys import parameters
from ..koala.architecture.layout import Layout, name
from ..koala.architecture.lineage import Lineage
from . import cache, checkpoints, footprint, measures, optimisers, processes, sources, texts, trackers, train
from .average import Average
from .config import Config, DataTable
from .entries import Entry
from .features import Pair
from .teacher import Teacher

GB = 10**9


@dataclass(frozen=True)
class Trial:
    """What a step of the run took."""

    seconds: float
    saved: int
    """Bytes that autograd saved in a forward pass: activations, features and copies of the weights."""
    text_encoders: int
    """Bytes of the weights of those that run while training."""
    peak: int | None
    """The most bytes that were allocated at once on a GPU."""


def report(config: Config, say: Callable[[str], None]) -> None:
    """Say, line by line, what ``train.run`` would do. Raises UserError as it does before its first step."""
    trackers.require_installed(config.log)
    measures.require(config)
    checkpoints.require_comparable(config)
    teacher, lineage, compared = train.planned(config)
    accelerator = Accelerator(mixed_precision=config.training.precision)
    processes.require_connected(accelerator)
    optimisers.require_installed(config.training, accelerator.distributed_type == DistributedType.FSDP)
    torch.backends.cuda.matmul.allow_tf32 = config.training.tf32
    trial = _trial(config, teacher, lineage, compared, accelerator)
    if accelerator.is_main_process:
        for line in (
            *_plan(config, teacher, lineage, accelerator.num_processes),
            *_memory(config, teacher, lineage, compared, accelerator, trial),
            *_time(config, accelerator.num_processes, trial),
        ):
            say(line)
    accelerator.end_training()


# --- the plan ----------------------------------------------------------------------------------------------------


def _plan(config: Config, teacher: Teacher, lineage: Lineage, number: int) -> Iterator[str]:
    table = config.training
    earlier = checkpoints.existing(config.output / "checkpoints")
    images, counted = _images(config, teacher)
    step = table.batch * table.accumulate * number
    yield "plan"
    yield f"  teacher      {teacher.name}, {parameters(teacher.layout) / 1e6:,.1f} M weights, {config.teacher.dtype}"
    yield f"  student      {name(lineage.student)}, {parameters(lineage.student) / 1e6:,.1f} M weights"
    yield f"  data         {counted}"
    yield (
        f"  batch        {table.batch} images x {table.accumulate} forward passes x {number} processes = {step} images "
        f"a step"
    )
    yield f"  steps        {table.steps:,}: {table.steps * step:,} images, {table.steps * step / images:,.1f} epochs"
    yield f"  output       {config.output}, {f'resumed from {earlier[-1].name}' if earlier else 'a new run'}"


def _images(config: Config, teacher: Teacher) -> tuple[int, str]:
    """The number of images to learn from, and how to say it."""
    data, held_out = config.data, config.validation.images
    if samples := cache.ready(data, teacher.identity):
        count, where = len(samples), f"all cached in {data.cache}"
    else:
        count, where = _entries(data), f"not all cached yet in {data.cache}"
    held_out = min(held_out, count // 2)
    return count - held_out, f"{count:,} images, {where}; {held_out:,} of them held out"


def _entries(data: DataTable) -> int:
    """The images of a source, none of them read. Raises UserError as ``sources.read`` does."""
    count = 0

    def wanted(_: Entry) -> bool:
        nonlocal count
        count += 1
        return False

    for _ in sources.read(data, lambda line: None, wanted=wanted):
        pass
    return count


# --- memory ------------------------------------------------------------------------------------------------------


def _memory(
    config: Config,
    teacher: Teacher,
    lineage: Lineage,
    compared: tuple[Pair, ...],
    accelerator: Accelerator,
    trial: Trial,
) -> Iterator[str]:
    table, gpus = config.training, accelerator.num_processes
    sharded = accelerator.distributed_type == DistributedType.FSDP
    needed = bool(compared or config.loss.output or config.steps.student)
    found = footprint.memory(
        table, lineage.student, teacher.layout if needed else None, config.teacher.dtype, 0, gpus if sharded else 1
    )
    rows = {
        "teacher": found.teacher,
        **({"text encoders": trial.text_encoders} if trial.text_encoders else {}),
        "weights": found.weights,
        "gradients": found.gradients,
        f"optimiser, {table.optimiser}": found.moments,
        "average (EMA)": found.average,
        f"activations, batch {table.batch}": trial.saved,
    }
    yield f"memory of each process on {accelerator.device.type}, GB"
    for part, size in rows.items():
        yield f"  {part:<28} {size / GB:8.3f}"
    yield f"  {'sum':<28} {sum(rows.values()) / GB:8.3f}   of {_available(accelerator.device) / GB:.1f}"
    if found.average_on_cpu:
        yield f"  {'average (EMA), on the CPU':<28} {found.average_on_cpu / GB:8.3f}"
    if trial.peak is not None:
        yield f"  {'largest use in the trial':<28} {trial.peak / GB:8.3f}"
    yield "  Activations are measured: what the trial saved for its backward pass, copies of the weights included."
    if config.log.samples_every or config.validation.images or measures.wanted(config):
        yield "  Not in it: what validation and sample images take (VAE, CLIP, and the averaged student in fp32)."


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


# --- time --------------------------------------------------------------------------------------------------------


def _time(config: Config, number: int, trial: Trial) -> Iterator[str]:
    table = config.training
    days = trial.seconds * table.steps / 86400
    rate = table.batch * table.accumulate * number / trial.seconds
    yield f"one step: {trial.seconds:.3g} s, {rate:.3g} images/s; all {table.steps:,}: {days:.3g} days"
    yield "  Measured on made-up latents, without reading data, checkpoints, validation and sample images."


def _trial(
    config: Config, teacher: Teacher, lineage: Lineage, compared: tuple[Pair, ...], accelerator: Accelerator
) -> Trial:
    """A forward and backward pass that is counted, in which everything is set up, and a whole step that is timed."""
    table, device = config.training, accelerator.device
    accelerator.gradient_accumulation_steps = 1
    network, objective = train.build(config, teacher, lineage, compared, accelerator)
    wrapped, optimiser = accelerator.prepare(network, optimisers.made(table, network.parameters()))
    average = Average(network, table.ema, table.ema_on_cpu) if table.ema else None
    encoders = train.text_encoders(config, teacher, device)
    with_texts = encoders.embedded if encoders else texts.unchanged
    batch = _batch(config, teacher.layout, device)
    optimisers.set_rate(optimiser, table.learning_rate)

    def one_pass() -> None:
        generator = torch.Generator().manual_seed(table.seed)
        train.one_pass(config, accelerator, wrapped, optimiser, objective, with_texts(batch), generator)

    saved = _counted(network, table.gradient_checkpointing, one_pass)
    accelerator.gradient_accumulation_steps = table.accumulate
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    before = time.monotonic()
    for _ in range(table.accumulate):
        one_pass()
    if average:
        average.update(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - before
    texts_size = sum(weight.nbytes for one in encoders.encoders for weight in one.parameters()) if encoders else 0
    return Trial(seconds, saved, texts_size, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)


def _counted(network: UNet2DConditionModel, checkpointing: bool, one_pass: Callable[[], None]) -> int:
    """Bytes that a pass saves for its backward pass, without the weights themselves."""
    weights, saved = footprint.Saved(), footprint.Saved()
    for parameter in network.parameters():
        weights.add(parameter.detach())

    def checkpointed(block: Callable[..., Any], *given: Any) -> Any:
        for tensor in given:  # kept by the checkpoint, not by autograd
            if isinstance(tensor, torch.Tensor):
                saved.add(tensor)
        return checkpoint(block, *given, use_reentrant=False)

    if checkpointing:
        network.enable_gradient_checkpointing(checkpointed)
    with saved.hooks():
        one_pass()
    if checkpointing:
        network.enable_gradient_checkpointing()
    return saved.beyond(weights)


def _batch(config: Config, layout: Layout, device: torch.device) -> dict[str, torch.Tensor]:
    """Made-up samples of the cache: square images, random latents, and random embeddings or tokens without meaning."""
    side, count = config.data.resolution, config.training.batch
    generator = torch.Generator().manual_seed(config.training.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator).to(device)

    embedded = {"context": random(cache.TOKENS, layout.context), "pooled": random(layout.pooled)}
    tokens = {"tokens": torch.zeros(count, 2, cache.TOKENS, dtype=torch.long)}
    return {
        "latents": random(layout.in_channels, side // 8, side // 8),
        **(tokens if config.data.texts == "tokens" else embedded),
        "ids": torch.tensor([[side, side, 0, 0, side, side]] * count, device=device).float(),
    }
