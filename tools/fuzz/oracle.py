"""What became of a case: refused by name, or loaded as it is; anything else is a fault of the pack."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from koala_sdxl.host.model import model_facts
from koala_sdxl.koala.files.conventions import SCHEDULER_KEY
from koala_sdxl.koala.files.header import CheckpointError, read_header
from koala_sdxl.koala.schedule import schedule
from tools.fuzz import loras, tensors
from tools.fuzz.bases import Base

Outcome = Literal["refused", "loaded", "foreign traceback", "silent difference"]
FAULTS: tuple[Outcome, ...] = ("foreign traceback", "silent difference")
STEPS = 25


@dataclass(frozen=True)
class Verdict:
    """A case's outcome, and the error's first line or the first difference."""

    outcome: Outcome
    text: str


def judge(base: Base, clean: Any, path: Path) -> Verdict:
    """Load a case and look at what came of it; ``clean`` is what ``learn`` found of the undamaged base."""
    try:
        loaded = base.load(path)
    except (CheckpointError, FileNotFoundError) as error:
        line = str(error).splitlines()[0] if str(error) else ""
        if path.stem in line:
            return Verdict("refused", line)
        return Verdict("foreign traceback", f"{type(error).__name__} without the file's name: {line}")
    except Exception as error:
        return Verdict("foreign traceback", _described(error))
    try:
        look = loras.differences if base.is_lora else _differences
        found = next(look(base, clean, path, loaded), None)
    except Exception as error:
        return Verdict("silent difference", f"loaded, but what it is cannot be found out: {_described(error)}")
    return Verdict("silent difference", found) if found else Verdict("loaded", "")


def learn(base: Base, path: Path) -> Any:
    """What an undamaged base is loaded as."""
    return (loras.learn if base.is_lora else tensors.learn)(base, path, base.load(path))


def _described(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    line = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
    return f"{type(error).__name__}: {line} ({place})"


def _differences(base: Base, clean: tensors.Clean, path: Path, loaded: Any) -> Iterator[str]:
    yield from tensors.differences(base, clean, path, loaded)
    model = next((part for part in loaded if hasattr(getattr(part, "model", None), "diffusion_model")), None)
    if model is not None:
        yield from _schedule(model, _stated(base, path))


def _stated(base: Base, path: Path) -> dict[str, Any]:
    """The scheduler's settings that a case brings."""
    if base.configs:
        file = path / "scheduler" / "scheduler_config.json"
        stated = json.loads(file.read_bytes()) if file.is_file() else {}
    else:
        stated = json.loads(read_header(path).metadata.get(SCHEDULER_KEY, "{}"))
    return dict(stated)


def _schedule(model: Any, stated: dict[str, Any]) -> Iterator[str]:
    """The timesteps that the U-Net is given at each step, against those of diffusers' scheduler with these settings."""
    facts = model_facts(model)
    for key, value in stated.items():
        if key in facts.scheduler and facts.scheduler[key] != value:
            yield f"scheduler: {key} is {value}, the model has {facts.scheduler[key]}"
    spacing = facts.scheduler["timestep_spacing"]
    sigmas = schedule(STEPS, spacing, config=facts.scheduler).sigmas  # type: ignore[arg-type]
    given = model.get_model_object("model_sampling").timestep(sigmas[:-1]).float()
    key = json.dumps({**facts.scheduler, **stated})
    wanted = _diffusers(key)
    if given.shape != wanted.shape or float((given - wanted).abs().max()) > 1:
        yield f"scheduler: timesteps {given[:3].tolist()} where diffusers has {wanted[:3].tolist()}"


@cache
def _diffusers(config: str) -> torch.Tensor:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_config(json.loads(config))
    scheduler.set_timesteps(STEPS)
    return scheduler.timesteps.float()
