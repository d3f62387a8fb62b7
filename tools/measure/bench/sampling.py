"""Runs of samplers, in one process that has a MODEL of the pack's loader and one of the stock loader."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel

from koala_sdxl import koala_loader
from koala_sdxl.host.accelerate.patch import accelerate
from koala_sdxl.koala.files.inspect import inspect_model, inspect_unet
from koala_sdxl.nodes.sample import KoalaSampler
from tools.measure.bench.comfy_engines import conditioning
from tools.measure.bench.engines import CFG, UNET, Job, job
from tools.measure.bench.meter import measured
from tools.measure.bench.variants import VARIANTS

TINY, COMPILED = "koala-tiny", "stock, compiled"
STOCK_NODES: Any = import_module("nodes")  # ComfyUI's: the checkout has a folder of that name, too
_models: dict[str, Any] = {}


def load_models(folder: str, loaders: Sequence[str] = ("pack", "stock")) -> dict[str, str]:
    """Load what ``run`` samples, by the loaders that its ways need: a folder's U-Net, or koala-tiny's (which no stock
    loader knows)."""
    _models.clear()
    _ways.clear()
    if folder == TINY:
        _models["pack"] = koala_loader.load_unet(inspect_model(koala_loader.BUILT_IN), TINY)
    else:
        file = Path(folder, UNET)
        if "pack" in loaders:
            _models["pack"] = koala_loader.load_unet(inspect_model(file), file.name)
        if "stock" in loaders:
            _models["stock"] = comfy.sd.load_diffusion_model(str(file))
    return {}


def run(way: str, folder: str, px: int, steps: int, batch: int = 1, out: str = "") -> dict[str, Any]:
    """Seconds of a run one way, its peak, and what KOALA Accelerate said of it; its latents go to the file ``out``.

    ``way``: "stock" (KSampler, the stock loader's MODEL), "stock, compiled" (behind core's TorchCompileModel),
    "KSampler" or "KOALA Sampler" (the pack loader's MODEL), or a variant of KOALA Accelerate (KOALA Sampler, the pack
    loader's MODEL). Their sigmas are the same where steps divide 1000.
    """
    file = koala_loader.BUILT_IN if folder == TINY else Path(folder, UNET)
    todo = job(inspect_unet(file).layout, px, batch, steps)
    if way not in _ways:
        _ways[way] = _Way.of(way)
    made = _ways[way]
    made.said.clear()
    sample = koala_sampler if way in VARIANTS or way == "KOALA Sampler" else ksampler
    figures = measured(lambda: sample(made.model, todo), out)
    return {**figures, "said": "; ".join([*made.how, *made.said])}


class _Way(NamedTuple):
    """The MODEL of a way, the same at every run, as where a node's output stays; how it computes, in words, and what is
    said of a run."""

    model: Any
    how: list[str]
    said: list[str]

    @classmethod
    def of(cls, way: str) -> _Way:
        said: list[str] = []
        if way in VARIANTS:
            model, *how = accelerate(_models["pack"], VARIANTS[way], said.append)
            return cls(model, [words for words in how if words], said)
        model = _models["stock" if way in ("stock", COMPILED) else "pack"]
        return cls(TorchCompileModel.execute(model, "inductor").result[0] if way == COMPILED else model, [], said)


_ways: dict[str, _Way] = {}


def ksampler(model: Any, todo: Job) -> torch.Tensor:
    """Stock KSampler on leading steps."""
    latent = {"samples": torch.zeros_like(todo.noise)}
    negative, positive = (conditioning(todo, row) for row in (0, 1))
    return STOCK_NODES.common_ksampler(model, 5, todo.steps, CFG, "euler", "ddim_uniform", positive, negative, latent)[
        0
    ]["samples"]


def koala_sampler(model: Any, todo: Job) -> torch.Tensor:
    """KOALA Sampler on the same steps."""
    latent = {"samples": torch.zeros_like(todo.noise)}
    negative, positive = (conditioning(todo, row) for row in (0, 1))
    preset = {"preset": "custom", "steps": todo.steps, "cfg": CFG, "spacing": "leading"}
    return KoalaSampler.execute(model, positive, negative, latent, 5, preset, "euler", 1.0).result[0]["samples"]
