"""What a worker can be told to do, by the name of its engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from koala_sdxl.koala.architecture.components import LATENT_SCALE
from koala_sdxl.koala.files.inspect import inspect_unet
from tools.measure.bench import meter
from tools.measure.bench.engines import UNET, Engine, activate, job
from tools.measure.bench.peers import OPENVINO
from tools.measure.bench.process import NO_ENGINE
from tools.measure.bench.variants import VAE_IN_BF16

Tasks = Mapping[str, Callable[..., Any]]


def make(name: str, device: str) -> Engine:
    """The engine of that name. A worker imports ComfyUI or diffusers, whichever it needs, and not the other."""
    if name == OPENVINO:
        from tools.measure.bench.openvino_engine import OpenVino

        return OpenVino(device)
    if name.startswith("diffusers"):
        from tools.measure.bench import diffusers_engine

        return diffusers_engine.ENGINES[name](device)
    activate(device)
    from tools.measure.bench import comfy_engines

    return comfy_engines.ENGINES[name]()


def tasks(name: str, device: str) -> Tasks:
    """What a worker of that name can be told to do: the functions by the names of the tasks."""
    if name == NO_ENGINE:
        activate(device)
        from koala_sdxl.host.accelerate.cpu_convolutions import winograd_is_faster_for_large_images
        from koala_sdxl.host.accelerate.cpu_products import one_dnn_is_faster
        from koala_sdxl.host.accelerate.cpu_routines import bf16_is_faster
        from koala_sdxl.host.accelerate.cpu_vae import bf16_convolves_faster
        from tools.measure.bench import macs, rates, sampling

        def quality(task: str) -> Callable[..., Any]:
            """Imported when it is asked for: it takes what trains koala-tiny."""
            return lambda **given: getattr(import_module("tools.measure.bench.image_quality"), task)(**given)

        return {
            "machine": lambda: meter.machine(device),
            "rates": lambda: rates.measured(device),
            "probes": lambda: {
                "oneDNN": one_dnn_is_faster(),
                "NNPACK": winograd_is_faster_for_large_images(),
                "bf16": bf16_is_faster(),
                VAE_IN_BF16: bf16_convolves_faster(),
            },
            "macs": macs.counted,
            "load_prompts": quality("load_prompts"),
            "quality": quality("compare"),
            "load_models": sampling.load_models,
            "sample": sampling.run,
        }
    engine: Any = make(name, device)

    def load(what: str, folder: str) -> dict[str, Any]:
        """Load once; ``above`` is how far memory rose over what the process had before."""
        work = {"everything": engine.load, "unet": engine.load_unet, "vae": engine.load_vae}[what]
        before = meter.forget_peak()
        seconds, _ = meter.timed(lambda: work(Path(folder)))
        most = meter.peak()
        above = {kind: most[kind] - before[kind] for kind in most}
        return {"seconds": seconds, "peak": most, "above": above, "weights": engine.weights()}

    def by(routines: str) -> Engine:
        return engine.by(routines) if routines else engine

    def step(folder: str, px: int, batch: int = 1, steps: int = 1, out: str = "", routines: str = "") -> dict[str, Any]:
        """Seconds a step."""
        todo, chosen = job(inspect_unet(Path(folder, UNET)).layout, px, batch, steps), by(routines)
        return meter.measured(lambda: chosen.denoise(todo), out, steps)

    def decode(px: int, out: str = "", routines: str = "") -> dict[str, Any]:
        latent, chosen = torch.randn(1, 4, px // 8, px // 8, generator=torch.Generator().manual_seed(3)), by(routines)
        return meter.measured(lambda: chosen.decode(latent / LATENT_SCALE), out)

    return {"load": load, "step": step, "decode": decode, "peak": meter.peak, "types": engine.types}
