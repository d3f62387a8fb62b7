"""The training run, on Hugging Face accelerate: one process or many, stopped and continued at any step.

Everything random comes from (seed, number of the forward pass, process), nothing from what was drawn before: a run that
goes on from a checkpoint draws what an unbroken run draws.
"""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..koala.architecture.lineage import Lineage
from ..koala.files import atomic_write as disk
from . import cache, features, losses, result, student
from .buckets import Batches
from .config import Config, LossTable, TrainingTable
from .errors import UserError
from .metrics import CsvTracker, Means
from .samples import Grid
from .teacher import Encoder, Teacher, open_teacher

FREE_TO_CHANGE = {
    "training": {"steps", "learning_rate", "final_rate", "warmup", "checkpoint_every", "keep"},
    "data": {"workers", "path", "cache"},
    "teacher": {"model", "tokenizer"},
    "log": None,
    "output": None,
}
"""What may differ when a run is continued: whole tables, or keys of one."""
FINISHED = "result"
Watch = Callable[[int, UNet2DConditionModel], None]


@dataclass(frozen=True)
class Objective:
    """What one forward pass of student and teacher gives to be trained on."""

    table: LossTable
    dropout: float
    noise: DDPMScheduler
    teacher: UNet2DConditionModel | None
    """None where only the noise itself is learnt."""
    pairs: tuple[features.Pair, ...]
    teacher_taps: features.Taps
    student_taps: features.Taps

    def errors(
        self, network: torch.nn.Module, batch: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Each term of the loss before its factor, for a batch of the cache's samples; scalars."""
        latents = batch["latents"]
        count, device = len(latents), latents.device
        noise = torch.randn(latents.shape, generator=generator).to(device)
        when = losses.time_steps(count, self.noise.config.num_train_timesteps, generator).to(device)
        kept = (torch.rand(count, generator=generator) >= self.dropout).float().to(device)
        noisy = self.noise.add_noise(latents, noise, when)
        given = {
            "encoder_hidden_states": batch["context"] * kept.view(count, 1, 1),
            "added_cond_kwargs": {"text_embeds": batch["pooled"] * kept.view(count, 1), "time_ids": batch["ids"]},
        }
        answer, wanted = None, {}
        if self.teacher is not None:
            kind = self.teacher.dtype
            with torch.no_grad(), self.teacher_taps.taking() as wanted:
                answer = self.teacher(noisy.to(kind), when, **_cast(given, kind)).sample
        with self.student_taps.taking() as found:
            predicted = network(noisy, when, **given).sample
        error = losses.feature_error(self.table, self.pairs, found, wanted).to(device)
        weights = losses.time_weights(self.table, self.noise, when)
        answer = predicted.detach() if answer is None else answer
        return losses.terms(self.table, weights, noise, predicted, answer, error)


def _cast(given: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: _cast(value, dtype) if isinstance(value, dict) else value.to(dtype) for key, value in given.items()}


def rate(table: TrainingTable, step: int) -> float:
    """The learning rate of optimiser step ``step`` (from 0) as a share of the full one: a straight rise, then a
    cosine down to ``final_rate``."""
    rise = min(1.0, (step + 1) / max(1, table.warmup))
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / table.steps))
    return rise * (table.final_rate + (1 - table.final_rate) * fall)


def run(config: Config, say: Callable[[str], None], watch: Watch | None = None) -> Path:
    """Train, or go on training, and write the result; returns its folder. Raises UserError.

    ``watch`` is called on the first process where a sample grid is due, with the step and the averaged student.
    """
    teacher = open_teacher(config.teacher)
    line = student.plan(config.student, teacher.layout)
    pairs = features.pairs(line, config.loss)
    done = config.output / FINISHED
    if done.exists():
        say(f"{done} is there already; nothing to do.")
        return done
    config.output.mkdir(parents=True, exist_ok=True)
    _same_run(config)
    csv = [CsvTracker(config.output / "metrics.csv")] if "csv" in config.log.to else []
    accelerator = Accelerator(
        mixed_precision=config.training.precision,
        gradient_accumulation_steps=config.training.accumulate,
        log_with=[*csv, *(to for to in config.log.to if to != "csv")],
        project_config=ProjectConfiguration(project_dir=str(config.output), logging_dir=str(config.output / "logs")),
        # the other processes wait while the first one fills the cache, which may take days
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    if not accelerator.is_main_process:
        say = _silent
    samples, grid = prepare(config, teacher, accelerator, say)
    watches = [*([grid.save] if grid else []), *([watch] if watch else [])]
    weights = _learn(config, teacher, line, pairs, samples, watches, accelerator, say)
    # the result is put together in the memory that training took
    accelerator.free_memory()
    gc.collect()
    if accelerator.is_main_process:
        result.write(config, teacher, line, weights, done)
        say(f"finished: {done}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # after it the processes do not know each other any more
    return done


def _silent(_: str) -> None:
    pass


def prepare(
    config: Config, teacher: Teacher, accelerator: Accelerator, say: Callable[[str], None]
) -> tuple[cache.Cache, Grid | None]:
    """The cached data, computed by the first process if need be, and the sample grid; the teacher's text encoders and
    VAE are in memory for this only."""
    drawing = accelerator.is_main_process and config.log.samples_every > 0 and bool(config.log.prompts)
    with accelerator.main_process_first():
        samples = cache.ready(config.data, teacher.identity)
        encoder = Encoder(teacher.pipeline(None), accelerator.device) if drawing or samples is None else None
        if samples is None and encoder:
            samples = cache.build(config.data, encoder, teacher.identity, say, say)
    grid = Grid.of(config, encoder) if drawing and encoder else None
    assert samples is not None
    return samples, grid


def _learn(
    config: Config,
    teacher: Teacher,
    line: Lineage,
    pairs: tuple[features.Pair, ...],
    samples: cache.Cache,
    watches: list[Watch],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """All steps that are left; the averaged weights at their end."""
    table = config.training
    network, objective = _objective(config, teacher, line, pairs, accelerator)
    optimiser = torch.optim.AdamW(
        network.parameters(), table.learning_rate, betas=table.betas, weight_decay=table.weight_decay, fused=True
    )
    wrapped, optimiser = accelerator.prepare(network, optimiser)
    average = EMAModel(wrapped.parameters(), decay=table.ema, foreach=True) if table.ema else None
    means = Means()
    accelerator.register_for_checkpointing(*filter(None, (average, means)))
    saves = config.output / "checkpoints"
    step = _resume(accelerator, saves, say)
    loader = _loader(config, samples, accelerator, step)
    _start_trackers(config, accelerator, step)
    progress = Progress(config, accelerator, step)
    for number, batch in enumerate(loader, step * table.accumulate):
        used = table.learning_rate * rate(table, step)  # not from the checkpoint: it may differ when a run goes on
        for group in optimiser.param_groups:
            group["lr"] = used
        with accelerator.accumulate(wrapped):
            found = objective.errors(wrapped, batch, _generator(table.seed, number, accelerator.process_index))
            loss = losses.total(config.loss, found)
            told = {name: value.detach() for name, value in {"loss": loss, **found}.items()}
            _finite(
                {f"{name} error": value for name, value in found.items()} | {"loss": loss}, accelerator, step, saves
            )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), table.clip)
                if table.precision != "fp16":  # there the scaler leaves out a step whose gradients overflow
                    _finite({"gradient's norm": norm}, accelerator, step, saves)
            optimiser.step()
            optimiser.zero_grad()
        means.add(told, accelerator)
        if not accelerator.sync_gradients:
            continue
        if average:
            average.step(wrapped.parameters())
        step += 1
        progress.step(step, means, used)
        if step % table.checkpoint_every == 0 or step == table.steps:
            _checkpoint(accelerator, saves, step, table.keep, network)
        if config.log.samples_every and (step % config.log.samples_every == 0 or step == table.steps):
            weights = averaged(accelerator, wrapped, average)
            for watch in watches if accelerator.is_main_process else ():
                watch(step, result.unet(line, weights))
    progress.bar.close()
    return averaged(accelerator, wrapped, average)


def _objective(
    config: Config, teacher: Teacher, line: Lineage, pairs: tuple[features.Pair, ...], accelerator: Accelerator
) -> tuple[UNet2DConditionModel, Objective]:
    """The student at its start, and what it is trained on."""
    master = teacher.unet()
    network = student.build(line, config.student.start, master, config.training.seed)
    if config.training.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network, Objective(
        table=config.loss,
        dropout=config.data.caption_dropout,
        noise=teacher.noise,
        teacher=master.to(accelerator.device) if pairs or config.loss.output else None,
        pairs=pairs,
        teacher_taps=features.Taps(master, (pair.teacher for pair in pairs)),
        student_taps=features.Taps(network, (pair.student for pair in pairs)),
    )


class Progress:
    """The bar, and the rows of metrics every so many steps."""

    def __init__(self, config: Config, accelerator: Accelerator, step: int) -> None:
        table = config.training
        self.accelerator, self.every, self.last = accelerator, config.log.every, table.steps
        self.seen = table.batch * table.accumulate * accelerator.num_processes
        self.bar = tqdm(
            total=table.steps * self.seen,
            initial=step * self.seen,
            unit=" images",
            disable=not accelerator.is_main_process,
            mininterval=1.0,
        )
        self.since, self.told_at = time.monotonic(), step

    def step(self, step: int, means: Means, learning_rate: float) -> None:
        """After optimiser step ``step``; takes the means where they are told."""
        self.bar.update(self.seen)
        if step % self.every and step != self.last:
            return
        speed = (step - self.told_at) * self.seen / (time.monotonic() - self.since)
        self.since, self.told_at = time.monotonic(), step
        row = {**means.take(), "learning_rate": learning_rate}
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
        self.accelerator.log({**row, "images_per_s": round(speed, 3)}, step=step)


def _generator(seed: int, number: int, process: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 4096 + process)


def _loader(config: Config, samples: cache.Cache, accelerator: Accelerator, step: int) -> Any:
    table = config.training
    passes = table.accumulate * accelerator.num_processes
    batches = Batches(
        samples.bucket_of, table.batch, table.seed, start=step * passes, count=(table.steps - step) * passes
    )
    return accelerator.prepare(DataLoader(samples, batch_sampler=batches, num_workers=config.data.workers))


def _start_trackers(config: Config, accelerator: Accelerator, step: int) -> None:
    for tracker in accelerator.log_with:
        if isinstance(tracker, CsvTracker):
            tracker.go_on_from(step)
    accelerator.init_trackers("tensorboard")


def averaged(accelerator: Accelerator, wrapped: torch.nn.Module, average: EMAModel | None) -> dict[str, torch.Tensor]:
    """The student's averaged weights, fp32 on the CPU, gathered on every process that holds them all."""
    if average:
        average.store(wrapped.parameters())
        average.copy_to(wrapped.parameters())
    weights = {name: value.float().cpu().clone() for name, value in accelerator.get_state_dict(wrapped).items()}
    if average:
        average.restore(wrapped.parameters())
    return weights


def _finite(told: Mapping[str, torch.Tensor], accelerator: Accelerator, step: int, saves: Path) -> None:
    """Raise UserError, on every process alike, where a term is no number any more; no weight has been changed by it."""
    odd = torch.stack([~torch.isfinite(value) for value in told.values()]).float()
    odd = accelerator.reduce(odd, "sum")
    if not odd.any():
        return
    bad = [name for name, found in zip(told, odd.tolist(), strict=True) if found]
    name = next((name for name in bad if name != "loss"), "loss")
    last = _checkpoints(saves)
    kept = f"the last good state is {last[-1]}" if last else "there is no checkpoint yet"
    raise UserError(
        f"step {step + 1}: the {name} is no finite number; training has stopped and {kept}. Lower "
        f'training.learning_rate, or take precision = "no" or a teacher dtype with more range, and run again: it goes '
        f"on from there."
    )


def _checkpoints(saves: Path) -> list[Path]:
    return sorted(path for path in saves.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def _resume(accelerator: Accelerator, saves: Path, say: Callable[[str], None]) -> int:
    """Load the last checkpoint; returns how many steps are done."""
    found = _checkpoints(saves)
    if not found:
        return 0
    try:
        accelerator.load_state(str(found[-1]))
    except Exception as error:  # torch, pickle and safetensors each have their own
        raise UserError(
            f"{found[-1]} cannot be loaded ({error}); expected a checkpoint of this run. Delete that folder: the run "
            f"then goes on from the one before."
        ) from None
    step = int(found[-1].name.partition("-")[2])
    say(f"going on from step {step}")
    return step


def _checkpoint(accelerator: Accelerator, saves: Path, step: int, keep: int, network: torch.nn.Module) -> None:
    """Write beside, rename, then drop the oldest. Raises UserError where the disk is full; earlier ones stay."""
    saves.mkdir(parents=True, exist_ok=True)
    target = saves / f"step-{step:07d}"
    aside = saves / f".step-{step:07d}.partial"
    size = 4 * 4 * sum(parameter.numel() for parameter in network.parameters())  # weights, two moments, average; fp32
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            if (free := shutil.disk_usage(saves).free) < size:
                raise OSError(f"{size / 1e9:.2f} GB needed, {free / 1e9:.2f} free")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    except (OSError, RuntimeError, disk.SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        last = _checkpoints(saves)
        raise UserError(
            f"{target} could not be written: {error}. "
            f"{f'The last checkpoint is {last[-1]}.' if last else 'There is no earlier one.'} Free space and run again."
        ) from None
    if accelerator.is_main_process:
        for old in _checkpoints(saves)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _same_run(config: Config) -> None:
    """Write the configuration into the output folder, or check that it is the one that began there."""
    path = config.output / "config.json"
    now = config.model_dump(mode="json")
    if not path.exists():
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # each process writes it; none sees a half of it
        aside.write_text(json.dumps(now, indent=2) + "\n", "utf-8")
        aside.replace(path)
        return
    begun = json.loads(path.read_text("utf-8"))
    for name, value in now.items():
        free = FREE_TO_CHANGE.get(name, set())
        if free is None:
            continue
        for key in value:
            if key not in free and begun[name].get(key) != value[key]:
                raise UserError(
                    f"{config.output} holds a run with {name}.{key} = {begun[name].get(key)!r}; now it is "
                    f"{value[key]!r}. Choose another output folder, or set it back to go on with that run."
                )
