"""What is measured: this pack, stock ComfyUI, diffusers, each doing the same work on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch

from koala_sdxl.koala.architecture.layout import Layout
from koala_sdxl.koala.files.inspect import inspect_unet
from koala_sdxl.koala.schedule import schedule
from tools.measure.bench import meter

UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
VAE = "vae/diffusion_pytorch_model.fp16.safetensors"
SCALE = 0.13025  # SDXL's latent scale
CFG = 7.5
Orders = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Job:
    """Some guided steps from random noise under random text, whose row 0 is the negative prompt, row 1 the prompt.

    ``noise`` (batch, 4, side / 8, side / 8), ``context`` (2, 77, width), ``pooled`` (2, width), ``steps``: of 25.
    """

    noise: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    steps: int

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels, one more than steps."""
        return schedule(25, "leading").sigmas[: self.steps + 1]


def job(layout: Layout, px: int, batch: int, steps: int) -> Job:
    """The same job for every engine."""
    generator = torch.Generator().manual_seed(3)
    return Job(
        torch.randn(batch, 4, px // 8, px // 8, generator=generator),
        torch.randn(2, 77, layout.context, generator=generator),
        torch.randn(2, layout.pooled, generator=generator),
        steps,
    )


class Engine(Protocol):
    """One way to make pictures. ``load*`` read from a diffusers folder; ``weights``: bytes of what was loaded."""

    def load(self, folder: Path) -> None:
        """U-Net, text encoders and VAE."""

    def load_unet(self, folder: Path) -> None: ...

    def load_vae(self, folder: Path) -> None: ...

    def weights(self) -> int: ...

    def denoise(self, todo: Job) -> torch.Tensor:
        """The latent after the job's steps, not yet scaled for the VAE."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Pictures of latents as the VAE takes them: (batch, height, width, 3) in 0..1."""


def make(name: str, device: str) -> Engine:
    """The engine of that name. A worker imports ComfyUI or diffusers, whichever it needs, and not the other."""
    if name == "diffusers":
        from tools.measure.bench.diffusers_engine import Diffusers

        return Diffusers(device)
    activate(device)
    from tools.measure.bench import comfy_engines

    return comfy_engines.ENGINES[name]()


def activate(device: str) -> None:
    """ComfyUI in this process, on that device."""
    from tools.harness import inprocess

    inprocess.activate()
    from comfy.cli_args import args

    args.cpu = device == "cpu"  # read while comfy.model_management is imported, which nothing has done yet


def orders(name: str, device: str) -> Orders:
    """What a worker of that name can be told to do."""
    if name == "lab":  # what needs the pack, but no engine beside it
        activate(device)
        from koala_sdxl.host.accelerate import cpu_routines as kernels
        from tools.measure.bench import gallery, macs, rates, sampling

        return {
            "machine": lambda: meter.machine(device),
            "rates": lambda: rates.measured(device),
            "probes": lambda: {"oneDNN": kernels.one_dnn_is_faster(), "bf16": kernels.bf16_is_faster()},
            "macs": macs.counted,
            "gallery": gallery.open_gallery,
            "quality": gallery.judged,
            "studio": sampling.open_studio,
            "sample": sampling.run,
        }
    engine: Any = make(name, device)

    def load(what: str, folder: str) -> dict[str, Any]:
        """Load once; ``above`` is how far memory rose over what the process had before."""
        work = {"whole": engine.load, "unet": engine.load_unet, "vae": engine.load_vae}[what]
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
        return measured(lambda: chosen.denoise(todo), out, steps)

    def decode(px: int, out: str = "", routines: str = "") -> dict[str, Any]:
        latent, chosen = torch.randn(1, 4, px // 8, px // 8, generator=torch.Generator().manual_seed(3)), by(routines)
        return measured(lambda: chosen.decode(latent / SCALE), out)

    return {"load": load, "step": step, "decode": decode, "peak": meter.peak}


def measured(work: Callable[[], torch.Tensor], out: str, times: int = 1) -> dict[str, Any]:
    """Seconds for one of ``times``, and peak; with ``out`` what was made is written there as an array."""
    meter.forget_peak()
    seconds, made = meter.timed(work)
    if out:
        numpy.save(out, made.float().cpu().numpy())
    return {"seconds": seconds / times, "peak": meter.peak()}
