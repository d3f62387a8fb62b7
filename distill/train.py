"""The training run, on Hugging Face accelerate: one process or many, interrupted and resumed at any step.

All random numbers come from the seed and the number of the forward pass, counted over all processes, none from an
earlier state: a run that resumes from a checkpoint, with whatever number of processes, draws the same numbers as an
uninterrupted one.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, gather_object
from diffusers import UNet2DConditionModel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..koala.architecture.lineage import Lineage
from . import build_cache, cache, checkpoints, losses, measures, optimisers, processes, result, student, texts, trackers
from .average import Average
from .buckets import Batches
from .config import Config, TrainingTable
from .divergence import Finite
from .entries import Part
from .evaluation import VALIDATED, Due, Evaluation, Watch
from .features import FeatureRecorder, Pair, pairs
from .few_steps import StepObjective
from .metrics import CsvTracker, Means
from .objective import Objective
from .samples import Grid
from .teacher import Encoder, Teacher, open_teacher
from .validation import Validation, split

FINISHED = "result"
"""The folder of the finished model, in the output folder."""


def rate(table: TrainingTable, step: int) -> float:
    """The learning rate of optimiser step ``step`` (from 0) as a share of the full one: a linear rise, and a cosine
    decay to ``final_rate``."""
    rise = min(1.0, (step + 1) / max(1, table.warmup))
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / table.steps))
    return rise * (table.final_rate + (1 - table.final_rate) * fall)


def run(config: Config, say: Callable[[str], None], watch: Watch | None = None) -> Path:
    """Train, or resume training, and write the result; returns its folder.

    Args:
        config: the configuration; its output folder holds whatever the run needs to resume.
        say: receives progress messages, on the first process.
        watch: called on the first process where sample images are due, with the step and the averaged student.

    Raises UserError for everything that the person can put right.
    """
    trackers.require_installed(config.log)
    measures.require(config)
    teacher, lineage, compared = planned(config)
    done = config.output / FINISHED
    if done.exists():
        say(f"{done} exists already; nothing to do.")
        return done
    accelerator = Accelerator(
        mixed_precision=config.training.precision,
        log_with=trackers.chosen(config),
        project_config=ProjectConfiguration(
            project_dir=str(config.output), logging_dir=str(config.output / trackers.LOGS)
        ),
        # a process may wait for another one's share of the cache, which may take days
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    processes.require_connected(accelerator)
    optimisers.require_installed(config.training, accelerator.distributed_type == DistributedType.FSDP)
    torch.backends.cuda.matmul.allow_tf32 = config.training.tf32
    if not accelerator.is_main_process:
        say = _silent
    with processes.held(accelerator, config.output, "output"):
        processes.on_main(accelerator, lambda: checkpoints.require_same_run(config))
        samples, grid = prepare(config, teacher, accelerator, say)
        weights, order = _learn(config, teacher, lineage, compared, samples, grid, watch, accelerator, say)
        # the result is assembled in the memory that training used
        accelerator.free_memory()
        gc.collect()
        if accelerator.is_main_process:
            result.write(config, teacher, lineage, weights, done, config.training.batch * order.passes)
            say(f"finished: {done}")
        accelerator.wait_for_everyone()
    accelerator.end_training()  # ends the process group, too
    return done


def planned(config: Config) -> tuple[Teacher, Lineage, tuple[Pair, ...]]:
    """The teacher, which of its layers the student has, and whose features are compared. Raises UserError."""
    teacher = open_teacher(config.teacher, compact=bool(config.steps.student))
    lineage = student.plan(config.student, teacher.layout, teacher.kept_transformers)
    return teacher, lineage, () if config.steps.student else pairs(lineage, config.loss)


def _silent(_: str) -> None:
    pass


def prepare(
    config: Config, teacher: Teacher, accelerator: Accelerator, say: Callable[[str], None]
) -> tuple[cache.Cache, Grid | None]:
    """The cached data, computed by all processes if necessary, and the grid of samples; the teacher's text encoders and
    VAE are in memory only for this."""
    pictured = config.log.samples_every > 0 or measures.wanted(config)
    drawing = accelerator.is_main_process and pictured and bool(config.log.prompts)
    is_ready = processes.on_main(accelerator, lambda: cache.ready(config.data, teacher.identity) is not None)
    encoder = Encoder(teacher.pipeline(), accelerator.device) if drawing or not is_ready else None
    if encoder and not is_ready:
        _fill_cache(config, teacher, encoder, accelerator, say)
    samples = processes.on_every(accelerator, lambda: cache.existing(config.data, teacher.identity))
    seen = samples.index.digest if samples else "none"
    advice = "Set data.cache to a folder on storage that all machines share, or copy the one cache to each."
    processes.require_same(accelerator, seen, f"data.cache = {str(config.data.cache)!r}", advice)
    assert samples is not None
    for line in samples.remarks():
        say(line)
    return samples, Grid.of(config, encoder) if drawing and encoder else None


def _fill_cache(
    config: Config, teacher: Teacher, encoder: Encoder, accelerator: Accelerator, say: Callable[[str], None]
) -> None:
    data, identity = config.data, teacher.identity
    part = Part(accelerator.process_index, accelerator.num_processes)
    with processes.held(accelerator, data.cache, "data.cache"):
        plan = processes.on_main(accelerator, lambda: build_cache.begin(data, identity, say))
        outcome = processes.on_every(accelerator, lambda: build_cache.encode(data, encoder, plan, part, say, say))
        outcomes = gather_object([outcome])
        processes.on_main(accelerator, lambda: build_cache.finish(data, identity, plan, outcomes, say).index.samples)


def _learn(
    config: Config,
    teacher: Teacher,
    lineage: Lineage,
    compared: tuple[Pair, ...],
    samples: cache.Cache,
    grid: Grid | None,
    watch: Watch | None,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> tuple[dict[str, torch.Tensor], checkpoints.Order]:
    """Run all remaining steps; returns the averaged weights at their end, on the main process, and the order of the
    images."""
    table, saves = config.training, config.output / "checkpoints"
    order = processes.on_every(
        accelerator,
        lambda: checkpoints.order(config, accelerator.num_processes, samples.index.digest, saves, say),
    )
    accelerator.gradient_accumulation_steps = order.passes // accelerator.num_processes
    network, objective = build(config, teacher, lineage, compared, accelerator)
    wrapped, optimiser = accelerator.prepare(network, optimisers.made(table, network.parameters()))
    average = Average(network, table.ema, table.ema_on_cpu) if table.ema else None
    means, finite = Means(), Finite()
    accelerator.register_for_checkpointing(means)
    step = processes.on_every(accelerator, lambda: checkpoints.resume(accelerator, saves, average, say))
    learned, held_out = split(config, samples)
    encoders = text_encoders(config, teacher, accelerator.device)
    with_texts = encoders.embedded if encoders else texts.unchanged
    validation = Validation(objective, samples, held_out, table.batch, table.seed, with_texts) if held_out else None
    CsvTracker(config.output / VALIDATED).resume_from(step)
    evaluation = Evaluation.of(config, validation, grid, watch, accelerator, say)
    loader = _loader(config, samples, learned, accelerator, step, order.passes)
    trackers.start(config, accelerator, step)
    progress = Progress(config, accelerator, step, order.passes, say)
    first = step * order.passes + accelerator.process_index
    for turn, batch in enumerate(map(with_texts, loader)):
        learning_rate = table.learning_rate * rate(table, step)  # not the checkpoint's: a resumed run may have another
        optimisers.set_rate(optimiser, learning_rate)
        number = first + turn * accelerator.num_processes  # of this forward pass, in the order of one process
        loss, errors, norm = one_pass(
            config, accelerator, wrapped, optimiser, objective, batch, _generator(table.seed, number)
        )
        finite.see({f"{name} error": value for name, value in errors.items()} | {"loss": loss}, step + 1)
        if norm is not None and table.precision != "fp16":  # there the scaler skips a step whose gradients overflow
            finite.see({"gradient's norm": norm}, step + 1)
        means.add({"loss": loss, **errors})
        if not accelerator.sync_gradients:
            continue
        if average:
            average.update(step)
        step += 1
        due = Due.at(config, step)
        if any(due):
            finite.require(accelerator, saves)
            means.fetch(accelerator)
        progress.step(step, means, learning_rate, due)
        unet = weights = None
        if due.samples or (due.validation and measures.wanted(config)):
            weights = averaged(accelerator, wrapped, average)
            unet = result.unet(lineage, weights) if accelerator.is_main_process else None
        found = evaluation.measured(step, network, average, unet, accelerator) if due.validation else None
        if found or due.checkpoint:
            checkpoints.save(accelerator, saves, step, table, network, average, order)
        if found and accelerator.is_main_process:
            checkpoints.write_best(saves, found, table.keep)
        if due.samples and unet:
            evaluation.shown(step, unet)
        unet = weights = None  # else on the GPU through the next pass
    progress.bar.close()
    if best := checkpoints.best(saves):
        say(f"the {best.measure} in validation is {best.value:.4f}, of step {best.step}; the result is of step {step}.")
    return averaged(accelerator, wrapped, average), order


def text_encoders(config: Config, teacher: Teacher, device: torch.device) -> texts.TextEncoders | None:
    """The teacher's text encoders, in fp32, where the cache holds tokens."""
    return texts.TextEncoders.of(teacher.pipeline(), device) if config.data.texts == "tokens" else None


def one_pass(
    config: Config,
    accelerator: Accelerator,
    wrapped: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    objective: Objective | StepObjective,
    batch: texts.Batch,
    generator: torch.Generator,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
    """One forward and backward pass, and the optimiser's step where it is the last of one: the loss, its terms, and
    then the gradient's norm. Nothing is fetched from a GPU."""
    with accelerator.accumulate(wrapped):
        errors = objective.errors(wrapped, batch, generator)
        loss, norm = losses.total(config.loss, errors), None
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = _plain(accelerator.clip_grad_norm_(wrapped.parameters(), config.training.clip))
        optimiser.step()
        optimiser.zero_grad()
    return loss, errors, norm


def build(
    config: Config, teacher: Teacher, lineage: Lineage, compared: tuple[Pair, ...], accelerator: Accelerator
) -> tuple[UNet2DConditionModel, Objective | StepObjective]:
    """The student with its initial weights, and what it is trained on."""
    table, teacher_unet = config.training, teacher.unet()
    network = student.build(lineage, config.student.start, teacher_unet, table.seed)
    if table.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    is_compared = bool(compared or config.loss.output or config.steps.student)
    for unet in (network, *([teacher_unet] if is_compared else [])):
        if table.channels_last:
            unet.to(memory_format=torch.channels_last)
        if table.compile:
            unet.compile_repeated_blocks()
    if config.steps.student:
        return network, StepObjective(
            table=config.loss,
            dropout=config.data.caption_dropout,
            steps=config.steps,
            noise=teacher.noise,
            teacher=teacher.in_place(teacher_unet, accelerator.device),
        )
    return network, Objective(
        table=config.loss,
        dropout=config.data.caption_dropout,
        noise=teacher.noise,
        teacher=teacher.in_place(teacher_unet, accelerator.device) if is_compared else None,
        pairs=compared,
        teacher_features=FeatureRecorder(teacher_unet, (pair.teacher for pair in compared)),
        student_features=FeatureRecorder(network, (pair.student for pair in compared)),
    )


class Progress:
    """The progress bar, and a row of metrics every so many steps."""

    def __init__(
        self, config: Config, accelerator: Accelerator, step: int, passes: int, say: Callable[[str], None]
    ) -> None:
        table = config.training
        self.accelerator, self.say = accelerator, say
        self.per_step = table.batch * passes
        self.bar = tqdm(
            total=table.steps * self.per_step,
            initial=step * self.per_step,
            unit=" images",
            disable=not accelerator.is_main_process,
            mininterval=1.0,
        )
        self.row_time, self.row_step = time.monotonic(), step

    def step(self, step: int, means: Means, learning_rate: float, due: Due) -> None:
        """After optimiser step ``step``: update the bar; where a row is due, log the means, and tell a loss that is far
        above its level."""
        self.bar.update(self.per_step)
        if not due.row:
            return
        speed = (step - self.row_step) * self.per_step / (time.monotonic() - self.row_time)
        self.row_time, self.row_step = time.monotonic(), step
        row = {**means.take(), "learning_rate": learning_rate}
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
        self.accelerator.log({**row, "images_per_s": round(speed, 3)}, step=step)
        if level := means.level.see(row["loss"]):
            self.say(
                f"step {step}: the loss is {row['loss']:.4g}, far above its level of {level:.4g} before. Training goes "
                f"on. If it does not come back, stop, lower training.learning_rate, and run again: the run resumes "
                f"from its last checkpoint."
            )


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 4096)


def _loader(
    config: Config, samples: cache.Cache, learned: list[int], accelerator: Accelerator, step: int, passes: int
) -> Any:
    table, bucket_of = config.training, samples.bucket_of
    batches = Batches(
        [bucket_of[index] for index in learned],
        table.batch,
        table.seed,
        start=step * passes,
        count=(table.steps - step) * passes,
    )
    return accelerator.prepare(
        DataLoader(cache.Learned(samples, learned, table.seed), batch_sampler=batches, num_workers=config.data.workers)
    )


def averaged(accelerator: Accelerator, wrapped: torch.nn.Module, average: Average | None) -> dict[str, torch.Tensor]:
    """The student's averaged weights, fp32 on the CPU, gathered from all processes; empty on all but the main one."""
    if average:
        return average.gathered(keep=accelerator.is_main_process)
    weights = accelerator.get_state_dict(wrapped)
    return {name: value.float().cpu().clone() for name, value in weights.items() if accelerator.is_main_process}


def _plain(value: torch.Tensor) -> torch.Tensor:
    """A tensor that each process has whole; where the student is sharded, so is the norm of its gradients."""
    return value.full_tensor() if isinstance(value, DTensor) else value
