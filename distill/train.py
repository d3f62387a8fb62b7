"""The training run, on Hugging Face accelerate: one process or many, interrupted and resumed at any step.

All random numbers come from the seed and the number of the forward pass, counted over all processes, none from an
earlier state: a run that resumes from a checkpoint, with whatever number of processes, draws the same numbers as an
uninterrupted one.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, gather_object
from diffusers import UNet2DConditionModel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..koala.architecture.lineage import Lineage
from . import build_cache, cache, checkpoints, losses, processes, result, student, texts
from .average import Average
from .buckets import Batches
from .config import Config, TrainingTable
from .entries import Part
from .errors import UserError
from .features import FeatureRecorder, Pair, pairs
from .metrics import CsvTracker, Means
from .objective import Objective
from .samples import Grid
from .teacher import Encoder, Teacher, open_teacher
from .validation import Validation, split

FINISHED = "result"
"""The folder of the finished model, in the output folder."""
Watch = Callable[[int, UNet2DConditionModel], None]


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
    teacher = open_teacher(config.teacher)
    lineage = student.plan(config.student, teacher.layout)
    compared = pairs(lineage, config.loss)
    done = config.output / FINISHED
    if done.exists():
        say(f"{done} exists already; nothing to do.")
        return done
    csv = [CsvTracker(config.output / "metrics.csv")] if "csv" in config.log.to else []
    accelerator = Accelerator(
        mixed_precision=config.training.precision,
        log_with=[*csv, *(to for to in config.log.to if to != "csv")],
        project_config=ProjectConfiguration(project_dir=str(config.output), logging_dir=str(config.output / "logs")),
        # a process may wait for another one's share of the cache, which may take days
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    processes.require_connected(accelerator)
    if not accelerator.is_main_process:
        say = _silent
    with processes.held(accelerator, config.output, "output"):
        processes.on_main(accelerator, lambda: checkpoints.require_same_run(config))
        samples, grid = prepare(config, teacher, accelerator, say)
        watches = [*([grid.save] if grid else []), *([watch] if watch else [])]
        weights, order = _learn(config, teacher, lineage, compared, samples, watches, accelerator, say)
        # the result is assembled in the memory that training used
        accelerator.free_memory()
        gc.collect()
        if accelerator.is_main_process:
            result.write(config, teacher, lineage, weights, done, config.training.batch * order.passes)
            say(f"finished: {done}")
        accelerator.wait_for_everyone()
    accelerator.end_training()  # ends the process group, too
    return done


def _silent(_: str) -> None:
    pass


def prepare(
    config: Config, teacher: Teacher, accelerator: Accelerator, say: Callable[[str], None]
) -> tuple[cache.Cache, Grid | None]:
    """The cached data, computed by all processes if necessary, and the grid of samples; the teacher's text encoders and
    VAE are in memory only for this."""
    drawing = accelerator.is_main_process and config.log.samples_every > 0 and bool(config.log.prompts)
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
    watches: list[Watch],
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
    network, objective = _objective(config, teacher, lineage, compared, accelerator)
    optimiser = torch.optim.AdamW(
        network.parameters(), table.learning_rate, betas=table.betas, weight_decay=table.weight_decay, fused=True
    )
    wrapped, optimiser = accelerator.prepare(network, optimiser)
    average = Average(network, table.ema) if table.ema else None
    means = Means()
    accelerator.register_for_checkpointing(means)
    step = processes.on_every(accelerator, lambda: checkpoints.resume(accelerator, saves, average, say))
    learned, held_out = split(config, samples)
    with_texts = _with_texts(config, teacher, accelerator)
    validation = Validation(objective, samples, held_out, table.batch, table.seed, with_texts) if held_out else None
    held_out_losses, best = CsvTracker(config.output / "validation.csv"), checkpoints.best(saves)
    held_out_losses.resume_from(step)
    loader = _loader(config, samples, learned, accelerator, step, order.passes)
    _start_trackers(config, accelerator, step)
    progress = Progress(config, accelerator, step, order.passes)
    first = step * order.passes + accelerator.process_index
    for turn, batch in enumerate(map(with_texts, loader)):
        learning_rate = table.learning_rate * rate(table, step)  # not the checkpoint's: a resumed run may have another
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        with accelerator.accumulate(wrapped):
            number = first + turn * accelerator.num_processes  # of this forward pass, in the order of one process
            errors = objective.errors(wrapped, batch, _generator(table.seed, number))
            loss = losses.total(config.loss, errors)
            named = {f"{name} error": value for name, value in errors.items()}
            _require_finite(named | {"loss": loss}, accelerator, step, saves)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), table.clip)
                if table.precision != "fp16":  # there the scaler skips a step whose gradients overflow
                    _require_finite({"gradient's norm": _plain(norm)}, accelerator, step, saves)
            optimiser.step()
            optimiser.zero_grad()
        means.add({name: value.detach() for name, value in {"loss": loss, **errors}.items()}, accelerator)
        if not accelerator.sync_gradients:
            continue
        if average:
            average.update(step)
        step += 1
        progress.step(step, means, learning_rate)
        is_best = False
        if validation and (step % config.validation.every == 0 or step == table.steps):
            with average.in_place() if average else nullcontext():
                row = validation.losses(network, accelerator)
            held_out_losses.log(row, step=step)
            is_best = math.isfinite(row["loss"]) and (best is None or row["loss"] < best.loss)
        if is_best or step % table.checkpoint_every == 0 or step == table.steps:
            checkpoints.save(accelerator, saves, step, table.keep, network, average, order)
        if is_best:
            best = checkpoints.Best(step=step, loss=row["loss"])
            if accelerator.is_main_process:
                checkpoints.write_best(saves, best)
        if config.log.samples_every and (step % config.log.samples_every == 0 or step == table.steps):
            weights = averaged(accelerator, wrapped, average)
            for watch in watches if accelerator.is_main_process else ():
                watch(step, result.unet(lineage, weights))
    progress.bar.close()
    if best:
        say(f"the lowest held-out loss is {best.loss:.4f}, of step {best.step}; the result is of step {step}.")
    return averaged(accelerator, wrapped, average), order


def _with_texts(config: Config, teacher: Teacher, accelerator: Accelerator) -> Callable[[texts.Batch], texts.Batch]:
    """What gives a batch its embeddings, where the cache holds tokens: the teacher's text encoders, in fp32."""
    if config.data.texts == "embeddings":
        return texts.unchanged
    return texts.TextEncoders.of(teacher.pipeline(), accelerator.device).embedded


def _objective(
    config: Config, teacher: Teacher, lineage: Lineage, compared: tuple[Pair, ...], accelerator: Accelerator
) -> tuple[UNet2DConditionModel, Objective]:
    """The student with its initial weights, and what it is trained on."""
    teacher_unet = teacher.unet()
    network = student.build(lineage, config.student.start, teacher_unet, config.training.seed)
    if config.training.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network, Objective(
        table=config.loss,
        dropout=config.data.caption_dropout,
        noise=teacher.noise,
        teacher=teacher_unet.to(accelerator.device) if compared or config.loss.output else None,
        pairs=compared,
        teacher_features=FeatureRecorder(teacher_unet, (pair.teacher for pair in compared)),
        student_features=FeatureRecorder(network, (pair.student for pair in compared)),
    )


class Progress:
    """The progress bar, and a row of metrics every so many steps."""

    def __init__(self, config: Config, accelerator: Accelerator, step: int, passes: int) -> None:
        table = config.training
        self.accelerator, self.every, self.last = accelerator, config.log.every, table.steps
        self.per_step = table.batch * passes
        self.bar = tqdm(
            total=table.steps * self.per_step,
            initial=step * self.per_step,
            unit=" images",
            disable=not accelerator.is_main_process,
            mininterval=1.0,
        )
        self.row_time, self.row_step = time.monotonic(), step

    def step(self, step: int, means: Means, learning_rate: float) -> None:
        """After optimiser step ``step``: update the bar, and log the means where a row is due."""
        self.bar.update(self.per_step)
        if step % self.every and step != self.last:
            return
        speed = (step - self.row_step) * self.per_step / (time.monotonic() - self.row_time)
        self.row_time, self.row_step = time.monotonic(), step
        row = {**means.take(), "learning_rate": learning_rate}
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
        self.accelerator.log({**row, "images_per_s": round(speed, 3)}, step=step)


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


def _start_trackers(config: Config, accelerator: Accelerator, step: int) -> None:
    for tracker in accelerator.log_with:
        if isinstance(tracker, CsvTracker):
            tracker.resume_from(step)
    accelerator.init_trackers("tensorboard")


def averaged(accelerator: Accelerator, wrapped: torch.nn.Module, average: Average | None) -> dict[str, torch.Tensor]:
    """The student's averaged weights, fp32 on the CPU, gathered from all processes; empty on all but the main one."""
    if average:
        return average.gathered(keep=accelerator.is_main_process)
    weights = accelerator.get_state_dict(wrapped)
    return {name: value.float().cpu().clone() for name, value in weights.items() if accelerator.is_main_process}


def _plain(value: torch.Tensor) -> torch.Tensor:
    """A tensor that each process has whole; where the student is sharded, so is the norm of its gradients."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _require_finite(values: Mapping[str, torch.Tensor], accelerator: Accelerator, step: int, saves: Path) -> None:
    """Raise UserError, on every process alike, where a value is infinite or NaN; called before the weights change."""
    bad = torch.stack([~torch.isfinite(value) for value in values.values()]).float()
    bad = accelerator.reduce(bad, "sum")
    if not bad.any():
        return
    names = [name for name, count in zip(values, bad.tolist(), strict=True) if count]
    name = next((name for name in names if name != "loss"), "loss")
    earlier = checkpoints.existing(saves)
    state = f"the last good state is {earlier[-1]}" if earlier else "there is no checkpoint yet"
    raise UserError(
        f"step {step + 1}: the {name} is not finite; training has stopped and {state}. Lower training.learning_rate, "
        f'or set precision = "no" or a teacher dtype with more range, and run again: the run resumes from there.'
    )
