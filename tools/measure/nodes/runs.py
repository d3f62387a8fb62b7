"""One node on one KOALA by one sampler: what comes of it."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from koala_sdxl import koala_loader
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_TINY
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.nodes.prompt import KoalaPrompt
from koala_sdxl.nodes.sample import KoalaSampler
from koala_sdxl.nodes.speed import KoalaAccelerate
from tools.harness.testhost import ROOT
from tools.measure.nodes.inputs import call, filled, fixtures, host_nodes
from tools.synthetic import adapters
from tools.tiny.judge import judge
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES

Outcome = Literal["works", "no effect", "spoils", "refused", "error"]
MODELS = ("700M", "1B")
SAMPLERS = ("KSampler", "KOALA Sampler")
ALONE, BEFORE, BEHIND = PLACES = ("alone", "before Accelerate", "behind Accelerate")
PROMPT, NEGATIVE = "a red circle on a white background", "blue"
ASKED = (COLOUR_NAMES.index("red"), COLOUR_NAMES.index("white"), SHAPE_NAMES.index("circle"))
CFG, SEED = 7.5, 5
STEPS = 10
CAREFUL_STEPS, CAREFUL_IMAGES = 25, 4
"""What a node is looked at with that seems to spoil the picture."""
LEAST_EFFECT, ROUNDING = 1e-3, 0.05
"""Difference that counts as none, of latents relative to their size (root mean square). ``ROUNDING`` is for KOALA
Accelerate with a node that has no effect without it: a third pass through the U-Net changes bf16's rounding."""


@dataclass(frozen=True)
class Place:
    """Where a node is run."""

    model: str
    sampler: str
    place: str
    empty_negative: bool = False


@dataclass(frozen=True)
class Run:
    """What came of a node in one place."""

    outcome: Outcome
    said: str
    """An error's first line."""
    difference: float
    """Of the latent, from the one without the node, relative to its size (root mean square)."""
    rows: float
    """Pictures that went through the U-Net, for each picture and step: 2 with a negative prompt."""


@contextmanager
def prepared() -> Iterator[None]:
    """Models and fixtures, and what nodes run within."""
    with (
        tempfile.TemporaryDirectory(prefix="koala-nodes-") as temporary,
        torch.inference_mode(),
        redirect_stderr(StringIO()),  # progress bars
    ):
        _folder.append(Path(temporary))
        try:
            yield
        finally:
            _folder.clear()
            for cached in (models, fixtures_of, _prompts, _baseline):
                cached.cache_clear()


_folder: list[Path] = []


@cache
def models() -> dict[str, tuple[Any, Any, Any]]:
    """koala-tiny, and a model of KOALA-1B's layers at its widths with random weights, each with koala-tiny's parts."""
    tiny = koala_loader.load_checkpoint(koala_loader.BUILT_IN)
    layout = replace(KOALA_1B, channels=KOALA_TINY.channels, context=KOALA_TINY.context, added=KOALA_TINY.added)
    file = _folder[0] / "koala-1b-tiny.safetensors"
    save_file(adapters.unet(layout), file)
    return {"700M": tiny, "1B": (koala_loader.load_unet(inspect_model(file), file.name), *tiny[1:])}


@cache
def fixtures_of(model: str) -> dict[str, Any]:
    _, empty = _prompts(model, "")
    if model == "700M":
        return fixtures(*models()[model], empty, _folder[0])
    koala = models()[model][0]
    other = koala.clone()
    changed = {"diffusion_model.out.2.weight": (0.1 * torch.ones_like(koala.model.diffusion_model.out[2].weight),)}
    other.add_patches(changed, 1.0)
    return {**fixtures_of("700M"), "second MODEL": other}


@cache
def _prompts(model: str, negative: str) -> Any:
    return KoalaPrompt.execute(models()[model][1], PROMPT, negative, "no style", "reference").result


def run(node: str, place: Place, least: float = LEAST_EFFECT) -> Run:
    """Run one of the host's nodes, with its widgets' default values, in one place; ``least``: see ``LEAST_EFFECT``."""
    try:
        koala = _with_node(node, place)
        latent, rows = sample(koala, place)
        spoiled = _spoiled(koala, latent, place)
    except Exception as error:
        return _failed(error)
    wanted, _ = _baseline(place)
    if latent.shape != wanted.shape or not bool(latent.isfinite().all()):
        return Run("spoils", "", float("inf"), rows)
    difference = float((latent - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    if difference <= least:
        return Run("no effect", "", difference, rows)
    return Run("spoils" if spoiled else "works", "", difference, rows)


def _with_node(node: str, place: Place) -> Any:
    koala = models()[place.model][0]
    if place.place == BEHIND:
        koala = _accelerated(koala)
    koala = call(host_nodes()[node], filled(node, koala, fixtures_of(place.model)))
    return _accelerated(koala) if place.place == BEFORE else koala


def _accelerated(koala: Any) -> Any:
    return call(KoalaAccelerate, {"model": koala, "preset": {"preset": "balanced"}})


@cache
def _baseline(place: Place, steps: int = STEPS, images: int = 1) -> tuple[torch.Tensor, float]:
    """The same without the node."""
    koala = models()[place.model][0]
    return sample(koala if place.place == ALONE else _accelerated(koala), place, steps, images)


def _spoiled(koala: Any, latent: torch.Tensor, place: Place) -> bool:
    """Whether pictures do not show any more what was asked for; only koala-tiny can be asked for anything."""
    if place.model != "700M":
        return False
    if not place.empty_negative and bool(latent.isfinite().all()) and right(latent):
        return False
    careful = place, CAREFUL_STEPS, CAREFUL_IMAGES
    return 2 * right(sample(koala, *careful)[0]) < right(_baseline(*careful)[0])


def _failed(error: Exception) -> Run:
    """Whose error it is: raised in the pack, in words, or in the host."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    ours = where.is_relative_to(ROOT) and isinstance(error, ValueError)
    return Run("refused" if ours else "error", line if ours else f"{type(error).__name__}: {line}", 0, 0)


def sample(koala: Any, place: Place, steps: int = STEPS, images: int = 1) -> tuple[torch.Tensor, float]:
    """Latents, and how many pictures went through the U-Net for each picture and step."""
    positive, negative = _prompts(place.model, "" if place.empty_negative else NEGATIVE)
    latent = {"samples": torch.zeros(images, 4, 16, 16)}
    counted: list[int] = []
    network = koala.model.diffusion_model
    hook = network.register_forward_pre_hook(lambda _, arguments: counted.append(len(arguments[0])))
    try:
        if place.sampler == "KSampler":
            nodes: Any = import_module("nodes")
            inputs = (SEED, steps, CFG, "euler", "ddim_uniform", positive, negative, latent)
            made = nodes.common_ksampler(koala, *inputs)[0]
        else:
            preset = {"preset": "custom", "steps": steps, "cfg": CFG, "spacing": "leading"}
            made = KoalaSampler.execute(koala, positive, negative, latent, SEED, preset, "euler", 1.0).result[0]
    finally:
        hook.remove()
    return made["samples"].float(), sum(counted) / images / steps


def right(latent: torch.Tensor) -> int:
    """How many pictures show what the prompt asks for."""
    pictures = models()["700M"][2].decode(latent).movedim(-1, 1) * 2 - 1
    found = judge(pictures)
    asked = zip((found.colour, found.background, found.shape), ASKED, strict=True)
    return int(torch.stack([part == wanted for part, wanted in asked]).all(0).sum())
