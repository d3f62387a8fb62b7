"""ComfyUI's engines: the pack's loader, stock loaders, SDXL for the ratio. ``engines.activate`` comes first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.diffusers_load
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel

from koala_sdxl import koala_loader
from koala_sdxl.host.accelerate import cpu_vae, gpu_vae
from koala_sdxl.host.accelerate.patch import accelerate
from koala_sdxl.host.accelerate.plan import Acceleration
from koala_sdxl.koala.architecture.keys import parameters
from koala_sdxl.koala.architecture.layout import SDXL
from koala_sdxl.koala.files.inspect import inspect_model, inspect_vae
from tools.measure.bench.engines import CFG, UNET, VAE, Job, named

ROOM = 14e9
"""Bytes of free memory that SDXL's U-Net needs in fp32, steps included."""


class Stock:
    """What DiffusersLoader, UNETLoader and VAELoader do."""

    model: Any = None
    clip: Any = None
    vae: Any = None

    def load(self, folder: Path) -> None:
        self.model, self.clip, self.vae = comfy.diffusers_load.load_diffusers(str(folder))

    def load_unet(self, folder: Path) -> None:
        self.model = comfy.sd.load_diffusion_model(str(folder / UNET))

    def load_vae(self, folder: Path) -> None:
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / VAE)))

    def weights(self) -> int:
        networks = [
            self.model and self.model.model.diffusion_model,
            self.clip and self.clip.cond_stage_model,
            self.vae and self.vae.first_stage_model,
        ]
        return sum(tensor.nbytes for network in networks if network for tensor in network.state_dict().values())

    def types(self) -> dict[str, str]:
        found = {}
        if self.model is not None:
            found["unet"] = named(self.model.model.get_dtype_inference())
        if self.vae is not None:
            found["vae"] = named(self.vae.vae_dtype)
        return found

    def denoise(self, todo: Job) -> torch.Tensor:
        negative, positive = (conditioning(todo, row) for row in (0, 1))
        sampler = comfy.samplers.sampler_object("euler")
        sampler.max_denoise = lambda *_: True  # scales the noise as the schedule says, as KOALA Sampler does
        empty = torch.zeros_like(todo.noise)
        return comfy.sample.sample_custom(
            self.model, todo.noise, CFG, sampler, todo.sigmas, positive, negative, empty, disable_pbar=True
        )

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent)


class Pack(Stock):
    """What KOALA Checkpoint Loader does."""

    def __init__(self, weight_dtype: str = "default") -> None:
        self.weight_dtype = weight_dtype
        self._made: dict[str, Any] = {}

    def load(self, folder: Path) -> None:
        self.model, self.clip, self.vae = koala_loader.load_folder(folder, self.weight_dtype)

    def load_unet(self, folder: Path) -> None:
        self.model = koala_loader.load_unet(inspect_model(folder / UNET), folder.name, self.weight_dtype)

    def by(self, routines: str) -> Pack:
        """The same with what KOALA Accelerate makes faster, none of its reuse; made once for what was loaded."""
        loaded = (self.model, self.vae)
        if self._made.get(routines, (None,))[0] != loaded:
            self._made[routines] = (loaded, self._accelerated(routines))
        other = self._made[routines][1]
        if other.model is not None:
            comfy.model_management.load_models_gpu([other.model])  # so that the change between clones is not timed
        return other

    def _accelerated(self, routines: str) -> Pack:
        other = copy.copy(self)
        if self.model is not None:
            other.model = accelerate(self.model, Acceleration(routines), lambda _: None).model
        if self.vae is not None:
            other.vae, how = cpu_vae.install(self.vae, routines)
            if not how:
                other.vae, _ = gpu_vae.install(self.vae)
        return other

    def load_vae(self, folder: Path) -> None:
        self.vae = koala_loader.load_vae(inspect_vae(folder / VAE))


class Compiled:
    """Another engine with core's TorchCompileModel behind its loader."""

    def __init__(self, inner: Stock) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load_unet(self, folder: Path) -> None:
        self._inner.load_unet(folder)
        self._inner.model = TorchCompileModel.execute(self._inner.model, "inductor").result[0]


class RandomSDXL(Stock):
    """SDXL's U-Net in core's own class, filled with random weights by the device: nothing so large is on disk. Its VAE
    is that of KOALA, too; it has no text encoders."""

    def load(self, folder: Path) -> None:
        self.load_unet(folder)
        self.load_vae(folder)

    def load_unet(self, folder: Path) -> None:
        management = comfy.model_management
        device = management.get_torch_device()
        config = comfy.supported_models.SDXL(koala_loader.unet_config(SDXL))
        wanted = torch.float16 if device.type == "cuda" else torch.float32
        fits = management.get_free_memory(device) > ROOM
        stored = wanted if fits or device.type == "cuda" else torch.bfloat16
        config.set_inference_dtype(stored, None if stored == wanted else wanted)
        model = config.get_model({}, "")
        for name, weights in model.diffusion_model.named_parameters():
            if weights.ndim > 1:
                reach = 0.7 * (3 / weights[0].numel()) ** 0.5  # keeps activations near 1
                weights.copy_(torch.empty_like(weights, device=device).uniform_(-reach, reach))
            else:
                weights.fill_(float(name.endswith("weight")))
        self.model = comfy.model_patcher.ModelPatcher(
            model, load_device=device, offload_device=management.unet_offload_device()
        )
        self.model.size = parameters(SDXL) * stored.itemsize


def conditioning(todo: Job, row: int) -> list[Any]:
    """One row of a job's text as CONDITIONING."""
    return [[todo.context[row : row + 1], {"pooled_output": todo.pooled[row : row + 1]}]]


ENGINES: dict[str, Callable[[], Any]] = {
    "pack": Pack,
    "pack, fp16 weights": lambda: Pack("fp16"),
    "stock": Stock,
    "SDXL": RandomSDXL,
    "pack, compiled": lambda: Compiled(Pack()),
    "stock, compiled": lambda: Compiled(Stock()),
}
